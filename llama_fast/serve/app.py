"""The application: every endpoint, in the order of the docs. Handlers are thin: a body becomes rows, and rows an answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llama_fast.serve.answers import Answer, ChatForm, CompletionForm, Prompt
from llama_fast.serve.bodies import ChatBody, CompletionBody, DetokenizeBody, Generating, TokenizeBody
from llama_fast.serve.door import Door, Limits
from llama_fast.serve.engine_thread import Group
from llama_fast.serve.errors import ApiError, of_validation, refused
from llama_fast.serve.scoring import prompt_logprobs
from llama_fast.serve.served import Served, chat_wanted

T = TypeVar("T")
CLIENT_LEFT = 499
"""What is counted of a request whose client left; it is sent to nobody."""
EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
ERROR = {
    "description": "A refusal, with the field that caused it",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}
REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": ERROR, "5XX": ERROR}
GENERATES: dict[int | str, dict[str, Any]] = {**REFUSALS, 200: {"description": "The answer", "content": EVENTS}}
PAGE_POLICY = "; ".join(
    (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'",
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    )
)
"""The page talks to this server and to no other, and stands in no other page."""


class Events(StreamingResponse):
    """A stream of events; its rows are cancelled if it ends early, in whatever way."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[str, None], group: Group | None):
        super().__init__(chunks, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._chunks, self._group = chunks, group

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._group is not None:
                self._group.close()
            with contextlib.suppress(RuntimeError):
                await self._chunks.aclose()


def application(served: Served, limits: Limits = Limits(), api_key: str | None = None) -> FastAPI:
    """The ASGI application that serves a model. The engine's thread lives as long as the application's lifespan."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served.thread.start()
        yield
        await served.thread.stop()

    app = FastAPI(title="llama-fast", lifespan=lifespan, docs_url=None, redoc_url=None, responses=REFUSALS)
    app.add_exception_handler(ApiError, tell_refusal)
    app.add_exception_handler(RequestValidationError, tell_invalid)
    app.add_exception_handler(HTTPException, tell_http)
    add_generation(app, served)
    add_tokens(app, served)
    add_state(app, served)
    paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    app.add_middleware(Door, metrics=served.metrics, limits=limits, api_key=api_key, paths=paths)
    return app


def add_generation(app: FastAPI, served: Served) -> None:
    """/v1/completions and /v1/chat/completions."""

    @app.post("/v1/completions", responses=GENERATES)
    async def completions(body: CompletionBody, request: Request) -> Response:
        body.check()
        served.check_model(body.model)
        constraint = await asyncio.to_thread(served.constraint, body)
        ids = await asyncio.to_thread(served.prompts, body)
        wanted = 16 if body.max_tokens is None else body.max_tokens
        rows = [(one, served.new_tokens("prompt", one, wanted)) for one in ids]
        prompts = await unless_left(request, echoed(served, body, ids))
        if prompts is None:
            return Response(status_code=CLIENT_LEFT)
        form = CompletionForm(served.spelling, body.logprobs)
        answer = Answer(form, served.name, prompts, body.candidates, body.choices)
        compares = body.candidates > body.choices
        logprobs = 0 if body.logprobs is None and compares else body.logprobs
        made = served.rows(body, rows, body.candidates, logprobs, constraint) if wanted else []
        group = served.thread.answer(made) if wanted else None
        return await answered(request, body, answer, group)

    @app.post("/v1/chat/completions", responses=GENERATES)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        body.check()
        served.check_model(body.model)
        constraint = await asyncio.to_thread(served.constraint, body)
        ids = await asyncio.to_thread(served.conversation, body.messages, body.offered)
        wanted = served.new_tokens("messages", ids, chat_wanted(body))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        form = ChatForm(served.spelling, logprobs, served.offered(body))
        answer = Answer(form, served.name, [Prompt(ids)], body.choices, body.choices)
        group = served.thread.answer(served.rows(body, [(ids, wanted)], body.choices, logprobs, constraint))
        return await answered(request, body, answer, group)

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [card(served)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        served.check_model(name)
        return JSONResponse(card(served))


def add_tokens(app: FastAPI, served: Served) -> None:
    """/tokenize and /detokenize."""

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> JSONResponse:
        served.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise refused("prompt", "either prompt or messages is to be tokenized")
        if body.messages is not None:
            ids = await asyncio.to_thread(served.conversation, body.messages)
        else:
            leads = body.add_special_tokens is not False
            ids = await asyncio.to_thread(served.llama.tokenizer.encode, body.prompt or "", leads)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": served.length})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> JSONResponse:
        served.check_model(body.model)
        if body.tokens:
            served.check_ids("tokens", body.tokens)
        text = await asyncio.to_thread(served.llama.tokenizer.decode, body.tokens, False)
        return JSONResponse({"prompt": text})


def add_state(app: FastAPI, served: Served) -> None:
    """/health, /metrics and the page."""
    page = files("llama_fast.serve").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> JSONResponse:
        served.thread.check_open()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(served.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def home() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY})


async def echoed(served: Served, body: CompletionBody, rows: Sequence[list[int]]) -> list[Prompt]:
    """The prompts with what `echo` puts before their answers."""
    if not body.echo:
        return [Prompt(ids) for ids in rows]
    texts = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
    prompts = []
    for i, ids in enumerate(rows):
        given = texts[i] if len(texts) == len(rows) else ids
        text = given if isinstance(given, str) else served.llama.decode(ids)
        told: list[Any] = []
        if body.logprobs is not None:
            job = partial(prompt_logprobs, served.llama.runner, ids, max(1, body.logprobs))
            told = [ids[0], *await served.thread.run(served.everywhere(job))]  # the first token follows nothing
        prompts.append(Prompt(ids, text, told))
    return prompts


async def answered(request: Request, body: Generating, answer: Answer, group: Group | None) -> Response:
    """The response to a request whose rows are on their way."""
    if body.stream:
        options = body.stream_options
        usage = bool(options and options.include_usage)
        return Events(answer.chunks(group, usage, bool(options and options.continuous_usage_stats)), group)
    try:
        content = await unless_left(request, answer.whole(group))
    finally:
        if group is not None:
            group.close()
    return Response(status_code=CLIENT_LEFT) if content is None else JSONResponse(content)


async def unless_left(request: Request, work: Awaitable[T]) -> T | None:
    """The result of some work; None, and the work is cancelled, if the client leaves before it is there."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def card(served: Served) -> dict[str, Any]:
    """What /v1/models tells of the model."""
    return {
        "id": served.name,
        "object": "model",
        "created": STARTED,
        "owned_by": "llama-fast",
        "max_model_len": served.length,
    }


STARTED = int(time.time())


async def tell_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def tell_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await tell_refusal(request, of_validation(error.errors()))


async def tell_http(request: Request, error: Exception) -> Response:
    """What the framework refuses: an unknown path, a wrong method, a body that it cannot parse."""
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, str(error.detail))
    return JSONResponse(told.body, told.status, headers={**told.headers, **(error.headers or {})})

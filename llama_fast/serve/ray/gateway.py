"""What clients speak to: the key and the limits at the door, and behind it whichever replica Ray chooses.

A request whose replica is lost is asked again as long as nothing of its answer was sent; then its client is told. When a client
leaves, Ray cancels its request here. Whatever was asked of a replica and is not wanted any more, for this or another reason, is
cancelled there by us: a stream that is dropped runs to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Metric
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_fast.serve.answers import sent
from llama_fast.serve.app import tell_http, tell_refusal
from llama_fast.serve.door import Door, Limits
from llama_fast.serve.errors import ApiError
from llama_fast.serve.metrics import Together, labelled
from llama_fast.serve.ray.calls import END, Call, Head, Piece, beginning

LOST = (RayActorError, ObjectLostError, WorkerCrashedError, EOFError)
"""What a handle raises when the replica of a request is lost; EOFError is ours, for an answer without its end."""
TRIES = 4
"""Replicas that a request is asked of: one that ends every replica it comes to must not go through all of them."""
PATIENCE = 9.0
"""Seconds in which all replicas tell how they are; Prometheus waits for ten."""
PATHS = frozenset(
    ("/", "/health", "/metrics", "/openapi.json", "/tokenize", "/detokenize")
    + ("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name:path}")
)
"""Paths that are counted by name."""


class Counts:
    """What one gateway counts."""

    def __init__(self) -> None:
        self.registry = here = CollectorRegistry()
        self.requests = Counter("llama_fast_gateway_requests", "Answered requests.", ["path", "status"], registry=here)
        self.again = Counter(
            "llama_fast_gateway_asked_again", "Requests asked again because their replica was lost.", registry=here
        )
        self.lost = Counter(
            "llama_fast_gateway_lost", "Answers that ended with a replica, and whose clients were told.", registry=here
        )


class Answer:
    """What a replica answers to one request: first its head, then pieces; cancelled there if nobody wants it any more."""

    def __init__(self, response: Any):
        """`response`: of a handle that streams."""
        self._response, self._ended = response, False
        self.head = Head(500, [])
        self.first = b""

    async def begin(self) -> None:
        """Until its head and the first piece are there, or all of it if it is no stream of events. One of LOST may be raised."""
        head = await self._next()
        if not isinstance(head, Head):
            raise EOFError("an answer without a head")
        self.head = head
        if head.is_stream:
            self.first = await self.piece()
        else:
            while not self._ended:
                self.first += await self.piece()

    async def piece(self) -> bytes:
        """The next piece; empty at the end. One of LOST may be raised."""
        found = await self._next()
        if found is END:
            self._ended = True
            return b""
        assert isinstance(found, bytes)
        return found

    async def _next(self) -> Piece:
        try:
            found: Piece = await self._response.__anext__()
        except StopAsyncIteration:
            raise EOFError("the answer has no end") from None
        return found

    @property
    def ended(self) -> bool:
        return self._ended

    def drop(self) -> None:
        """Nobody wants it: cancel what has not ended."""
        if not self._ended:
            self._ended = True
            self._response.cancel()


class Relayed(Response):
    """An answer that has begun, as a response."""

    def __init__(self, answer: Answer, counts: Counts):
        super().__init__()
        self._answer, self._counts = answer, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer
        try:
            await send({"type": "http.response.start", "status": answer.head.status, "headers": answer.head.headers})
            piece = answer.first
            while not answer.ended:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                piece = await self._piece()
            await send({"type": "http.response.body", "body": piece})
        finally:
            answer.drop()

    async def _piece(self) -> bytes:
        """The next piece; an event that tells of it if the replica is lost."""
        try:
            return await self._answer.piece()
        except (RayError, EOFError):
            self._answer.drop()
            self._counts.lost.inc()
            return sent(lost("the replica was lost before this answer was complete").body).encode()


class Inside(Response):
    """An application that answers a request that Ray has given out of its hands."""

    def __init__(self, app: ASGIApp):
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class Gateway:
    """The deployment that Ray's proxies ask."""

    def __init__(self, replicas: Any, limits: Limits, api_key: str | None, reads: bool):
        """`replicas`: their handle. `reads`: whether the placement compares how prompts begin."""
        self.id = serve.get_replica_context().replica_id.unique_id
        self.replicas, self.limits, self.reads, self.counts = replicas, limits, reads, Counts()
        self.own: Any = None
        door = Middleware(Door, metrics=self.counts, limits=limits, api_key=api_key, paths=PATHS)  # type: ignore[arg-type]
        methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/metrics", self.page),
                Route("/{path:path}", self.forward, methods=methods),
            ],
            middleware=[door],
            exception_handlers={ApiError: tell_refusal, HTTPException: tell_http},
        )

    async def __call__(self, request: Request) -> Response:
        return Inside(self.app)

    async def forward(self, request: Request) -> Response:
        """The answer of a replica."""
        body, path = await request.body(), "/" + request.path_params["path"]
        prompt = beginning(path, body) if self.reads else ""
        kind = request.headers.get("content-type", "").encode()
        call = Call(request.method, path, request.scope["query_string"], kind, body, prompt)
        try:
            answer = await asyncio.wait_for(self.begun(call), self.limits.timeout)
        except asyncio.TimeoutError:
            raise ApiError(408, f"there was no answer within {self.limits.timeout:g} s", code="timeout") from None
        return Relayed(answer, self.counts)

    async def begun(self, call: Call) -> Answer:
        """An answer that has begun, of the first replica that lives long enough. ApiError if there is none."""
        for _ in range(TRIES):
            answer = Answer(self.replicas.options(stream=True).answer.remote(call))
            try:
                await answer.begin()
            except LOST:
                answer.drop()
                self.counts.again.inc()
            except BackPressureError:
                raise ApiError(429, "the queue is full", code="queue_full") from None
            except DeploymentUnavailableError:
                raise ApiError(503, "no replica is available", code="no_replica") from None
            except RayError as error:
                said = " ".join(str(error).split())[-300:]
                raise ApiError(500, f"the replica could not answer: {said}", code="replica_failed") from None
            except BaseException:  # the client has left, or our time is up
                answer.drop()
                raise
            else:
                return answer
        raise lost(f"{TRIES} replicas were lost with this request, before any had begun to answer")

    async def health(self, request: Request) -> Response:
        """200 if a replica takes requests."""
        if True not in await everyone(self.replicas, "is_open"):
            raise ApiError(503, "no replica takes requests", code="no_replica")
        return JSONResponse({"status": "ok"})

    async def page(self, request: Request) -> Response:
        """/metrics of all replicas and gateways, by the label `replica`."""
        if self.own is None:
            self.own = serve.get_deployment_handle(serve.get_replica_context().deployment)
        told = await asyncio.gather(everyone(self.replicas, "metrics"), everyone(self.own, "metrics"))
        page = Together(part for parts in told for part in parts).page()
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def metrics(self) -> Sequence[Metric]:
        """What this gateway has counted."""
        return labelled(self.counts.registry, replica=self.id)


async def everyone(handle: Any, method: str) -> list[Any]:
    """What each replica of a deployment returns, but for those that are lost. ApiError 503 if one does not answer in time.

    (Ray then gives none of the answers, and counters that vanish for a while would be worse than a page that is not there.)
    """
    try:
        told = await handle.broadcast(method).results_async(timeout_s=PATIENCE, return_exceptions=True)
    except DeploymentUnavailableError:
        return []
    except TimeoutError:
        raise ApiError(503, f"not all replicas answered within {PATIENCE:g} s", code="slow_replica") from None
    return [one for one in told if not isinstance(one, BaseException)]


def lost(message: str) -> ApiError:
    return ApiError(503, message, code="replica_lost")

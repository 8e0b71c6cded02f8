"""From a group's events to OpenAI's answers: one JSON object at the end, or a chunk for every piece of text."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llama_fast.engine.logprobs import TokenLogprob
from llama_fast.engine.request import LENGTH, Event
from llama_fast.serve.engine_thread import Group
from llama_fast.serve.errors import ApiError
from llama_fast.serve.spelling import CompletionLogprobs, Spelling, chat_logprobs
from llama_fast.serve.tools import Offered, Reader

ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class Prompt:
    """A prompt that is answered, and what `echo` puts before the answer."""

    ids: list[int]
    echo: str = ""
    echoed: list[TokenLogprob | int] = field(default_factory=list)
    """Its tokens' log-probabilities, if they are wanted; the first token's is its bare id."""


class Form(Protocol):
    """How one of the two endpoints spells choices."""

    kind: str
    chunk_kind: str
    prefix: str

    def whole(self, index: int, prompt: Prompt, events: Sequence[Event]) -> dict[str, Any]:
        """A choice with its whole answer."""

    def first(self, index: int, prompt: Prompt) -> dict[str, Any] | None:
        """What a choice's chunks begin with, before there is a token."""

    def piece(self, index: int, event: Event) -> dict[str, Any] | None:
        """What a chunk says of a token; None if there is nothing to say yet."""


class CompletionForm:
    """Choices of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, spelling: Spelling, logprobs: int | None):
        self._spelling, self._top = spelling, logprobs
        self._told: dict[int, CompletionLogprobs] = {}

    def _logprobs(self, index: int, told: list[TokenLogprob | int], text: str) -> dict[str, Any] | None:
        if self._top is None:
            return None
        if index not in self._told:
            self._told[index] = CompletionLogprobs(self._spelling, self._top)
        return self._told[index].of(told, text)

    def whole(self, index: int, prompt: Prompt, events: Sequence[Event]) -> dict[str, Any]:
        parts = [self._logprobs(index, prompt.echoed, prompt.echo)] if prompt.echo or prompt.echoed else []
        parts += [self._logprobs(index, [event.logprob], event.text) for event in events if event.logprob is not None]
        logprobs = None
        if self._top is not None:
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            logprobs = {name: [one for part in parts if part for one in part[name]] for name in names}
        text = prompt.echo + "".join(event.text for event in events)
        ended = events[-1].finish_reason if events else LENGTH
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": ended}

    def first(self, index: int, prompt: Prompt) -> dict[str, Any] | None:
        if not prompt.echo and not prompt.echoed:
            return None
        logprobs = self._logprobs(index, prompt.echoed, prompt.echo)
        return {"index": index, "text": prompt.echo, "logprobs": logprobs, "finish_reason": None}

    def piece(self, index: int, event: Event) -> dict[str, Any] | None:
        if not event.text and event.logprob is None and event.finish_reason is None:
            return None
        told = None if event.logprob is None else self._logprobs(index, [event.logprob], event.text)
        return {"index": index, "text": event.text, "logprobs": told, "finish_reason": event.finish_reason}


class ChatForm:
    """Choices of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, spelling: Spelling, logprobs: int | None, tools: Offered | None = None):
        """`tools`: those that an answer may call."""
        self._spelling, self._top, self._tools = spelling, logprobs, tools
        self._readers: dict[int, Reader] = {}

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        if self._top is None:
            return None
        told = [event.logprob for event in events if event.logprob is not None]
        return {"content": [chat_logprobs(self._spelling, one, self._top) for one in told], "refusal": None}

    def whole(self, index: int, prompt: Prompt, events: Sequence[Event]) -> dict[str, Any]:
        said = Reader(self._tools).read("".join(event.text for event in events), events[-1].finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
        if said.calls:
            message |= {"content": None, "tool_calls": [call.as_json() for call in said.calls]}
        ended = said.finish_reason
        return {"index": index, "message": message, "logprobs": self._logprobs(events), "finish_reason": ended}

    def first(self, index: int, prompt: Prompt) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, event: Event) -> dict[str, Any] | None:
        said = self._readers.setdefault(index, Reader(self._tools)).read(event.text, event.finish_reason)
        if not said.text and event.logprob is None and said.finish_reason is None:
            return None
        delta: dict[str, Any] = {"content": said.text} if said.text else {}
        if said.calls:
            delta["tool_calls"] = [{"index": i, **call.as_json()} for i, call in enumerate(said.calls)]
        logprobs = self._logprobs([event])
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": said.finish_reason}


@dataclass(frozen=True)
class Usage:
    """The tokens of a request: all prompts once, all rows' new ones."""

    prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class Answer:
    """The answer to one request: `each` rows of every prompt, of which the best `told` are told."""

    def __init__(self, form: Form, model: str, prompts: Sequence[Prompt], each: int = 1, told: int = 1):
        self.form, self.prompts, self.each, self.told = form, prompts, each, told
        self._head = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}
        self._prompt_tokens = sum(len(prompt.ids) for prompt in prompts)

    async def whole(self, group: Group | None) -> dict[str, Any]:
        """The answer as one object, when all rows have ended. Without a group nothing new is wanted."""
        rows: list[list[Event]] = [[] for _ in range(len(self.prompts) * self.each)]
        if group is not None:
            async for events in group:
                for row, event in events:
                    rows[row].append(event)
        choices = []
        for at, prompt in enumerate(self.prompts):
            own = rows[at * self.each : (at + 1) * self.each]
            if self.told < self.each:
                own.sort(key=mean_logprob, reverse=True)  # stable: of equals, the first
            choices += [
                self.form.whole(at * self.told + i, prompt, events) for i, events in enumerate(own[: self.told])
            ]
        usage = Usage(self._prompt_tokens, sum(map(len, rows)))
        return {**self._head, "object": self.form.kind, "choices": choices, "usage": usage.as_json()}

    async def chunks(self, group: Group | None, usage: bool, always: bool) -> AsyncGenerator[str, None]:
        """The answer as server-sent events. `usage`: tell it in a last chunk; `always`: in every one.

        What ends an answer before its time is told as an event with OpenAI's error body.
        """
        tokens = 0
        # what is the same in all chunks is spelled once: a server sends thousands a second
        head = ENCODER.encode({**self._head, "object": self.form.chunk_kind})[:-1] + ',"choices":['

        def chunk(choice: dict[str, Any] | None, last: bool = False) -> str:
            end = "]}"
            if always or (usage and last):
                end = f'],"usage":{ENCODER.encode(Usage(self._prompt_tokens, tokens).as_json())}}}'
            elif usage:
                end = '],"usage":null}'
            return f"data: {head}{'' if choice is None else ENCODER.encode(choice)}{end}\n\n"

        # how choices begin is told with the first token: what has told nothing can still be answered elsewhere
        held = ""
        rows = [(at, prompt) for at, prompt in enumerate(p for p in self.prompts for _ in range(self.each))]
        for index, prompt in rows:
            begin = self.form.first(index, prompt)
            if group is None and begin is not None:
                begin["finish_reason"] = LENGTH
            if begin is not None:
                held += chunk(begin)
        try:
            if group is not None:
                async for events in group:
                    said = []
                    for index, event in events:
                        tokens += 1
                        piece = self.form.piece(index, event)
                        if piece is not None:
                            said.append(chunk(piece))
                    if said:
                        yield held + "".join(said)
                        held = ""
        except ApiError as error:
            yield sent(error.body)
            return
        if held:
            yield held
        if usage:
            yield chunk(None, last=True)
        yield "data: [DONE]\n\n"


def mean_logprob(events: Sequence[Event]) -> float:
    """The mean log-probability of a row's tokens: OpenAI's measure of the best of several."""
    told = [event.logprob.logprob for event in events if event.logprob is not None]
    return sum(told) / len(told) if told else float("-inf")


def sent(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {ENCODER.encode(content)}\n\n"

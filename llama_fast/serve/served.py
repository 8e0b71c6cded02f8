"""What is served: a model under a name, the thread of its engine, and what a request becomes before it goes there."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from llama_fast.engine.guides import Constraint
from llama_fast.engine.request import Request, Writer, check_bias
from llama_fast.llama import Llama
from llama_fast.serve.bodies import ChatBody, CompletionBody, Generating, Message, Tool
from llama_fast.serve.engine_thread import EngineThread
from llama_fast.serve.errors import ApiError, refused
from llama_fast.serve.following import LeadingEngine
from llama_fast.serve.metrics import Metrics
from llama_fast.serve.spelling import EndingWriter, Spelling
from llama_fast.serve.tools import Offered, ToolForm, by_force, form_of
from llama_ref.tokenizers.chat import chat_text, may_go_on
from llama_ref.tokenizers.chat_templates import BUILT_IN, template_named

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """A model that clients know as `name`."""

    llama: Llama
    name: str
    thread: EngineThread
    metrics: Metrics

    def everywhere(self, job: Callable[[], T]) -> Callable[[], T]:
        """A job of the engine's thread that uses the model: over ranks, all of them do it."""
        engine = self.thread.engine
        return engine.everywhere(job) if isinstance(engine, LeadingEngine) else job

    @cached_property
    def spelling(self) -> Spelling:
        return Spelling(self.llama.tokenizer)

    @property
    def length(self) -> int:
        """Positions of a row: prompt and answer."""
        return self.thread.engine.length

    def check_model(self, name: str | None) -> None:
        """404 for another model's name; a request without one means this model."""
        if name is not None and name != self.name:
            raise ApiError(404, f"model: {name!r:.80} is not served here, {self.name!r} is", "model", "model_not_found")

    def prompts(self, body: CompletionBody) -> list[list[int]]:
        """The ids of a completion's prompts."""
        given = body.prompt
        if isinstance(given, str):
            found = [self.llama.tokenizer.encode(given)]
        elif isinstance(given[0], int):
            found = [list(given)]  # type: ignore[arg-type]  # ids, all of them
        else:
            found = [self.llama.tokenizer.encode(one) if isinstance(one, str) else list(one) for one in given]  # type: ignore[arg-type]
        for ids in found:
            self.check_ids("prompt", ids)
        return found

    def constraint(self, body: Generating) -> Constraint | None:
        """What the answer must be; 400 by its field for a grammar that is refused, and for what would cut its texts."""
        asked = body.grammar()
        if asked is None and isinstance(body, ChatBody) and body.forced:
            form = self.tool_form()
            if form is None:
                raise refused("tool_choice", "how this chat template spells a call is not known here")
            try:
                asked = "tool_choice", by_force(form, body.forced)
            except ValueError as error:
                raise refused("tools", str(error)) from None
        if asked is None:
            return None
        field, grammar = asked
        if body.stops or body.stop_token_ids:
            cuts = "stop" if body.stops else "stop_token_ids"
            raise refused(cuts, f"it would cut an answer that {field} makes whole: leave one of them out")
        try:
            return self.llama.constraint(grammar)
        except ValueError as error:
            raise refused(field, str(error).removeprefix("grammar: ")) from None

    def tool_form(self) -> ToolForm | None:
        """How the chat template has calls of tools spelled; None if that is not known."""
        return form_of(template_named(self.llama.tokenizer, self.llama.chat_template))

    def offered(self, body: ChatBody) -> Offered | None:
        """The tools that an answer may call, if it can be told when it does."""
        form = self.tool_form() if body.offered else None
        if form is None:
            return None
        names = frozenset(tool.function.name for tool in body.offered)
        return Offered(form, names, body.parallel_tool_calls is not False)

    def conversation(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The ids of a conversation, up to where the reply starts; last words of the assistant are gone on with."""
        tokenizer, name = self.llama.tokenizer, self.llama.chat_template
        plain = [message.plain() for message in messages]
        try:
            template = template_named(tokenizer, name)
            if tools and (template in BUILT_IN or "tools" not in template):
                raise refused("tools", "the model's chat template takes no tools")
            goes_on = may_go_on(plain)
            more = {"tools": [tool.model_dump(exclude_none=True) for tool in tools]} if tools else {}
            text = chat_text(tokenizer, plain, not goes_on, goes_on, name, **more)
            ids = tokenizer.encode(text, bos=False)
        except (ValueError, RecursionError) as error:
            said = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
            raise refused("messages", said) from None
        self.check_ids("messages", ids)
        return ids

    def check_ids(self, field: str, ids: Sequence[int]) -> None:
        """400 for a prompt without ids, or with one that the model does not have."""
        vocabulary = self.llama.runner.config.vocab_size
        if not ids:
            raise refused(field, "it has no tokens: there is nothing to continue")
        wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise refused(field, f"token id {wrong} is outside the vocabulary of {vocabulary}")

    def new_tokens(self, field: str, ids: Sequence[int], wanted: int | None) -> int:
        """How many tokens a prompt may get: what is wanted, or what there is room for."""
        room = self.length - len(ids)
        if room < (1 if wanted is None else min(wanted, 1)):
            raise ApiError(
                400,
                f"{field}: {len(ids)} tokens leave no room for an answer in the {self.length} positions of a row",
                field,
                "context_length_exceeded",
            )
        if wanted is not None and wanted > room:
            raise ApiError(
                400,
                f"max_tokens: a prompt of {len(ids)} tokens and {wanted} new ones exceed the {self.length} positions of a row",
                "max_tokens",
                "context_length_exceeded",
            )
        return room if wanted is None else wanted

    def rows(
        self,
        body: Generating,
        prompts: Sequence[tuple[list[int], int]],
        each: int,
        logprobs: int | None,
        constraint: Constraint | None = None,
    ) -> list[tuple[Request, Writer]]:
        """`each` rows for every prompt and its number of new tokens; row r of all draws with seed + r."""
        eos, stop_ids = self.llama.runner.config.eos_ids, body.stop_token_ids or []
        ends = {*(() if body.ignore_eos else eos), *stop_ids}
        first = replace(body.sampling(secrets.randbelow(2**53)), grammar=constraint)
        try:
            check_bias(self.llama.runner.config, first)
        except ValueError as error:
            raise ApiError(400, str(error), "logit_bias") from None
        seeds = first.seeds(len(prompts) * each)
        found: list[tuple[Request, Writer]] = []
        for ids, wanted in prompts:
            for _ in range(each):
                sampling = replace(first, seed=seeds[len(found)])
                writer: Writer = self.llama.writer(ids, body.stops)
                if stop_ids:
                    writer = EndingWriter(writer, stop_ids)
                found.append((Request(ids, wanted, sampling, ends, logprobs), writer))
        self.check_draft([request for request, _ in found])
        return found

    def check_draft(self, requests: Sequence[Request]) -> None:
        """400 for what cannot be had while a draft proposes tokens, as log-probabilities."""
        engine = self.thread.engine
        if engine.draft is not None:
            try:
                engine.draft.check(engine.runner, requests, engine.cache.capacity)
            except ValueError as error:
                raise ApiError(400, str(error)) from None


def chat_wanted(body: ChatBody) -> int | None:
    """How many tokens a reply may have, by either name; None is what there is room for."""
    return body.max_completion_tokens if body.max_tokens is None else body.max_tokens

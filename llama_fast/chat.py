"""A conversation with a model: every turn adds to what the cache holds, and only what is new is read.

The template makes the whole conversation text again each time, and its ids are compared with those that the cache holds;
keys and values of the common beginning are kept.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any

from llama_fast.engine.engine import Engine
from llama_fast.engine.request import STOP, Request
from llama_fast.engine.sampling import Sampling
from llama_fast.engine.text import stop_strings
from llama_fast.llama import Llama
from llama_ref.arguments import made, shown, whole
from llama_ref.arguments import text as checked_text
from llama_ref.tokenizers.chat import last_words, may_go_on, with_words


class Chat:
    """What was said so far, and the cache that holds it."""

    def __init__(
        self,
        llama: Llama,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling = Sampling(),
        stop: str | Iterable[str] | None = (),
    ):
        """`system`: what the model is told before the first turn. A reply is at most `max_new_tokens` long."""
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling={shown(sampling)} must be a Sampling")
        self.llama = made(
            "llama", llama, "a Llama, as Llama.from_pretrained() opens one", "runner", "tokenizer", "writer"
        )
        self.max_new_tokens, self.sampling = whole("max_new_tokens", max_new_tokens, 1), sampling
        self.stop = stop_strings(stop)
        if self.stop and sampling.grammar is not None:
            raise ValueError(
                f"stop={list(self.stop)!r:.80} would cut a reply that the grammar makes whole: leave one out"
            )
        system = None if system is None else checked_text("system", system)
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self.reused_tokens = 0
        """How many tokens of the last turn's prompt the cache already held."""
        self.prompt_tokens = 0
        self._engine: Engine | None = None

    def say(self, text: str, begin: str = "") -> Generator[str, None, None]:
        """The reply in pieces; `begin` are its first words, which are not told again.

        Whoever stops listening, or is interrupted, keeps what was said until then. Raises ValueError, and forgets the
        turn, where the conversation leaves no room for a reply.
        """
        begun = [{"role": "assistant", "content": begin}] if checked_text("begin", begin) else []
        return self._reply([*self.messages, {"role": "user", "content": checked_text("text", text)}, *begun])

    def go_on(self) -> Generator[str, None, None]:
        """More of the last reply, in pieces: where it was cut short, or where `messages` ends with the assistant's words.

        Raises ValueError where there are none.
        """
        if not may_go_on(self.messages):
            raise ValueError(
                "the conversation does not end with words of the assistant: there is no reply to go on with"
            )
        return self._reply(self.messages)

    def _reply(self, messages: list[dict[str, Any]]) -> Generator[str, None, None]:
        """The words that come next in a conversation, which becomes the conversation with them."""
        runner, conversation = self.llama.runner, self.llama.chat_text(messages)
        ids = self.llama.tokenizer.encode(conversation, bos=False)
        room = runner.config.max_context - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, the model's context is {runner.config.max_context}: start anew"
            )
        request = Request(ids, min(self.max_new_tokens, room), self.sampling, runner.config.eos_ids)
        engine, said, ended = self._room_for(request.positions), "", False
        engine.close()  # a turn that nobody listens to any more
        before, tokens = engine.reused_tokens, 0
        turn = engine.add(request, self.llama.writer(ids, self.stop))
        try:
            while engine.answers(turn):
                events = engine.step()
                self.reused_tokens, self.prompt_tokens = engine.reused_tokens - before, len(ids)
                for event in events:
                    said, tokens = said + event.checked().text, tokens + 1
                    ended = event.finish_reason == STOP
                    if event.text:
                        yield event.text
        finally:
            engine.cancel(turn)
            if tokens:
                # space at its end belongs to a reply that may go on
                self.messages = with_reply(messages, conversation, said.rstrip() if ended else said)

    def forget(self) -> None:
        """Back to before the first turn; what the model was told at the start stays."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def _room_for(self, length: int) -> Engine:
        """The conversation's engine, whose cache holds what was read; a longer one, empty, where it is too short."""
        runner = self.llama.runner
        if self._engine is None or self._engine.length < length:
            cache = runner.allocate(1, min(2 * length, runner.config.max_context))
            room = min(cache.capacity or runner.config.max_context, runner.config.max_context)
            self._engine = Engine(runner, 1, room, cache, keeps_prefixes=True)
        return self._engine


def with_reply(messages: Sequence[dict[str, Any]], conversation: str, said: str) -> list[dict[str, Any]]:
    """Messages with what was `said` after them; `conversation` is their text.

    ([..., {"role": "assistant", "content": "The answer"}], "...The answer", " is 4.") -> [..., "The answer is 4."]
    """
    if not may_go_on(messages):
        return [*messages, {"role": "assistant", "content": said.lstrip()}]
    begun = last_words(messages[-1]) or ""
    if not conversation.endswith(begun):
        begun = begun.rstrip()  # the template trims it, and what was said brings its own space
    return [*messages[:-1], with_words(messages[-1], begun + said)]

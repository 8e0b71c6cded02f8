"""What is asked for one row, and the row while it is answered: `Row` is the one place that knows when a text ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from llama_fast.engine.guides import Guide
from llama_fast.engine.logprobs import TokenLogprob
from llama_fast.engine.sampling import Sampling
from llama_ref.arguments import row_of_ids, set_of_ids, shown, whole
from llama_ref.config import LlamaConfig

STOP, LENGTH, CANCELLED, FAILED = "stop", "length", "cancelled", "failed"
"""Why a row ended: at an EOS id, a stop string or the end of its grammar; at as many tokens as were asked for; because nobody
wants it any more; because its grammar could not go on."""


@dataclass(frozen=True)
class Request:
    """One prompt's ids and how they are to be continued: at most `max_new_tokens`, up to one of `eos_ids`, which is kept.

    `sampling` is that of one row, with one seed. `logprobs`: tell each token's log-probability, and those of as many of the
    likeliest; None tells none. Raises TypeError or ValueError that names the argument.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos_ids: Collection[int] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"sampling={shown(self.sampling)} must be a Sampling")
        fields = {
            "ids": tuple(row_of_ids("ids", self.ids)),
            "max_new_tokens": whole("max_new_tokens", self.max_new_tokens, 1),
            "sampling": replace(self.sampling, seed=self.sampling.seeds(1)[0]),
            "eos_ids": frozenset(set_of_ids("eos_ids", self.eos_ids)),
            "logprobs": None if self.logprobs is None else whole("logprobs", self.logprobs),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        if not self.ids:
            raise ValueError("a prompt is empty: there is nothing to continue")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs={self.logprobs} must not be negative")
        grammar = self.sampling.grammar
        foreign = set(self.eos_ids).difference(grammar.ends if grammar is not None else self.eos_ids)
        if foreign:
            raise ValueError(
                f"eos_ids: token {min(foreign)} would end a text at any place; the grammar knows no such end"
            )

    @property
    def positions(self) -> int:
        """The positions that it needs: of its prompt, and of all tokens that it may get."""
        return len(self.ids) + self.max_new_tokens


def requests_of(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_ids: Collection[int] = (),
    logprobs: int | None = None,
) -> list[Request]:
    """A request for each prompt; row b draws with the b-th of `sampling.seeds`."""
    whole("max_new_tokens", max_new_tokens, 1)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: there is nothing to continue")
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling={shown(sampling)} must be a Sampling")
    rows = zip(prompts, sampling.seeds(len(prompts)), strict=True)
    return [Request(ids, max_new_tokens, replace(sampling, seed=seed), eos_ids, logprobs) for ids, seed in rows]


def check_request(
    config: LlamaConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, scoring: bool = False
) -> int:
    """The positions that these prompts need; ValueError, with the numbers, if the model cannot serve them.

    `scoring`: no new tokens are wanted.
    """
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 0 if scoring else 1)
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty: there is nothing to continue")
    for prompt in prompts:
        check_ids(prompt, config.vocab_size)
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > config.max_context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{config.max_context}" + ("" if scoring else f" (max_new_tokens={max_new_tokens})")
        )
    return longest + max_new_tokens


def check_ids(ids: Sequence[int], vocabulary: int) -> None:
    """ValueError for a prompt's token id that is not one of `vocabulary`."""
    for token in ids:
        if not 0 <= token < vocabulary:
            raise ValueError(f"a prompt's token id {token} is outside the vocabulary of {vocabulary}")


def check_bias(config: LlamaConfig, sampling: Sampling) -> None:
    """ValueError for a token id of a logit bias that is not one of the vocabulary."""
    for token in sampling.bias:
        if token >= config.vocab_size:
            raise ValueError(f"logit_bias: token id {token} is outside the vocabulary of {config.vocab_size}")


class Writer(Protocol):
    """What makes text of a row's tokens, as `text.TextStream`."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""

    def push(self, token: int) -> str:
        """The text that a token completes."""

    def finish(self) -> str:
        """The text that was held back, at the row's end."""


class Event(NamedTuple):  # made for every token: a frozen dataclass takes three times as long
    """A token that a row got. `finish_reason` is None while more come; then "stop" or "length", or "failed"."""

    id: int
    token: int
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None
    text: str = ""
    """What the token completes, where the row has a writer: the pieces of a row, joined, are its text."""
    failure: str = ""
    """Why the row failed, in one line."""

    def checked(self) -> Event:
        """The event; ValueError, with the reason, if the row has failed."""
        if self.finish_reason == FAILED:
            raise ValueError(f"grammar: {self.failure}")
        return self


class Row:
    """A request while it is answered."""

    def __init__(self, id: int, request: Request, writer: Writer | None = None):
        """`writer`: makes text of the tokens, and ends the row at a stop string."""
        self.id, self.request, self.writer = id, request, writer
        grammar = request.sampling.grammar
        self.guide: Guide | None = None if grammar is None else grammar.begin()
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.most = request.max_new_tokens
        self.slot: int | None = None
        self.launched = 0
        """Tokens that the device was asked for; the host may not have seen the last ones."""
        self.ids: Sequence[int] = request.ids
        """What is read before the next token is chosen: the prompt, and of a row that made way for others, what it had said."""
        self.held = 0
        """How many of these had their keys and values there already."""
        self.read = 0
        """How many of these have their keys and values there, or on their way."""
        self.made_way = False
        """Whether it had to make way for others."""

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return 0 if self.ended else self.most - len(self.tokens)

    @property
    def to_launch(self) -> int:
        """Tokens that the device is still to be asked for."""
        return 0 if self.finish_reason is not None else self.most - self.launched

    @property
    def reading(self) -> bool:
        """Whether some of its ids are still to be read, and no token can be chosen."""
        return self.read < len(self.ids)

    @property
    def due(self) -> bool:
        """Whether the next step is to give it a token."""
        return self.launched < self.most and self.finish_reason is None and self.read >= len(self.ids)

    @property
    def reach(self) -> int:
        """Positions that are written when the next step is done."""
        return len(self.request.ids) + self.launched

    @property
    def stored(self) -> list[int]:
        """The ids that the host knows to be in the cache. The last token was chosen, and not yet read."""
        return list(self.ids[: self.read]) if self.reading else [*self.request.ids, *self.tokens[:-1]]

    def make_way(self) -> None:
        """Give up the slot, and what is under way; to be read again, what was said included, before it goes on."""
        self.slot, self.made_way = None, True
        self.ids = [*self.request.ids, *self.tokens]
        self.held = self.read = 0
        self.launched = len(self.tokens)

    def take(self, token: int, logprob: TokenLogprob | None = None) -> Event:
        """The next token of a row that has not ended. Whether it is the last is decided here and nowhere else."""
        assert self.finish_reason is None
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        writer, guide = self.writer, self.guide
        text = "" if writer is None else writer.push(token)
        if guide is not None:
            guide.take(token)
            if guide.failure is not None:
                self.finish_reason = FAILED
                return Event(self.id, token, logprob, FAILED, failure=guide.failure)
        complete = token in self.request.eos_ids if guide is None else guide.complete
        if complete or (writer is not None and writer.stopped):
            self.finish_reason = STOP
        elif len(self.tokens) == self.most:
            self.finish_reason = LENGTH
        if writer is not None and self.finish_reason is not None:
            text += writer.finish()
            if writer.stopped:  # what was held back ended with a stop string
                self.finish_reason = STOP
        return Event(self.id, token, logprob, self.finish_reason, text)

    def cancel(self) -> None:
        """Nobody wants more of it."""
        if not self.ended:
            self.finish_reason = CANCELLED

"""A batch of prompts that starts together, without text: the engine's requests and their answers as lists."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from llama_fast.contracts import KVCache
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Event, Request, Writer, check_request, requests_of
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import Sampling
from llama_fast.engine.speculation import Speculation, Statistics
from llama_ref.arguments import made, rows_of_ids, set_of_ids, shown


@dataclass(frozen=True)
class Completion:
    """One row's continuation. `finish_reason` is "stop" (an EOS id, kept as the last token) or "length"."""

    tokens: list[int]
    finish_reason: str
    prompt_tokens: int


@dataclass(frozen=True)
class Generation:
    """All rows' continuations and the time they took; a first token's time includes the prefill."""

    completions: list[Completion]
    first_token_seconds: float
    total_seconds: float
    speculation: Statistics | None = None

    @property
    def new_tokens(self) -> int:
        return sum(len(completion.tokens) for completion in self.completions)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows / wall time of prefill and decode."""
        return self.new_tokens / self.total_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """The same without the prefill and the tokens it gave; 0 where nothing was decoded."""
        decoded = self.new_tokens - len(self.completions)
        return decoded / (self.total_seconds - self.first_token_seconds) if decoded else 0.0


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_ids: Collection[int] = (),
    cache: KVCache | None = None,
    draft: Speculation | None = None,
) -> Generation:
    """Continue each prompt until one of `eos_ids` or `max_new_tokens`. `cache` is reused if given, else allocated.

    `draft` proposes tokens that the runner then checks several at a time: `Draft(runner, k=5)`, `Ngram(k=8)`.
    """
    made("runner", runner, "a Runner, as build() makes one", "start", "step", "allocate")
    prompts, eos_ids = rows_of_ids("prompts", prompts), set_of_ids("eos_ids", eos_ids)
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling={shown(sampling)} must be a Sampling")
    check_request(runner.config, prompts, max_new_tokens)
    requests = requests_of(prompts, max_new_tokens, sampling, eos_ids)
    began = time.perf_counter()
    first = 0.0
    engine = together(runner, requests, cache, draft)
    rows: list[list[Event]] = [[] for _ in requests]
    while engine.busy:
        for event in engine.step():
            first = first or time.perf_counter() - began
            rows[event.id].append(event.checked())
    total = time.perf_counter() - began
    completions = [
        Completion([event.token for event in row], row[-1].finish_reason or "", len(request.ids))
        for row, request in zip(rows, requests, strict=True)
    ]
    return Generation(completions, first, total, engine.statistics)


def together(
    runner: Runner,
    requests: Sequence[Request],
    cache: KVCache | None = None,
    draft: Speculation | None = None,
    writers: Sequence[Writer | None] = (),
) -> Engine:
    """An engine with a slot for each of these requests, which bear the numbers 0, 1, ...; a writer for each, or none."""
    engine = Engine(runner, len(requests), max(request.positions for request in requests), cache, draft)
    if draft is not None:
        draft.check(runner, requests, engine.cache.capacity)
    for request, writer in zip_longest(requests, writers):
        engine.add(request, writer)
    return engine


def stream(
    runner: Runner, requests: Sequence[Request], cache: KVCache | None = None, draft: Speculation | None = None
) -> Iterator[list[Event | None]]:
    """One list per step with each request's new token; None for one that has ended. Ends when every one has.

    Where several tokens come at once, they are one list after another.
    """
    engine = together(runner, requests, cache, draft)
    while engine.busy:
        rows: list[list[Event]] = [[] for _ in requests]
        for event in engine.step():
            rows[event.id].append(event.checked())
        for i in range(max(map(len, rows))):
            yield [row[i] if i < len(row) else None for row in rows]

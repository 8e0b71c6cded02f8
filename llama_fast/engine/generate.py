"""The decode loop: prefill once, then one token after another, without the host waiting for the device.

The token, its position and the next step's input stay on the device. What the host wants to see (for stop conditions,
for streaming) is copied to it in the background and read a few tokens later; tokens computed past a row's end are
dropped. Shapes: B rows, T tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_fast.contracts import KVCache
from llama_fast.engine.logprobs import Logprobs
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import BatchSampler, Sampling
from llama_fast.engine.speculation import Speculation, Statistics
from llama_ref.arguments import made, rows_of_ids, set_of_ids, shown, whole
from llama_ref.config import LlamaConfig

IN_FLIGHT = 4
"""Tokens that a GPU may be ahead of the host: enough to hide the launch of one, little to waste at the end of a text."""


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
    needed = check(runner, prompts, max_new_tokens)
    if cache is not None:
        check_cache(cache, len(prompts), needed)
    if draft is not None:
        made("draft", draft, "who proposes tokens, as Draft(runner) or Ngram()", "begin", "slack")
    rows: list[list[int]] = [[] for _ in prompts]
    began = time.perf_counter()
    first = 0.0
    session = draft and draft.begin(runner, prompts, max_new_tokens, sampling, eos_ids, cache)
    steps = session.steps() if session else stream(runner, prompts, max_new_tokens, sampling, eos_ids, cache)
    for step in steps:
        first = first or time.perf_counter() - began
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    total = time.perf_counter() - began
    completions = [
        Completion(row, "stop" if row[-1] in eos_ids else "length", len(prompt))
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    return Generation(completions, first, total, session.statistics if session else None)


def stream(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_ids: Collection[int] = (),
    cache: KVCache | None = None,
    logprobs: Logprobs | None = None,
    held: int = 0,
) -> Iterator[list[int | None]]:
    """One list per step with each row's new token; None for a row that has ended. Ends when every row has.

    Row b draws with the b-th of `sampling.seeds`, so its text does not depend on the rows beside it. `logprobs` is filled
    as the tokens come. `held`: the first tokens of every prompt whose keys and values `cache` holds already.
    """
    length = check(runner, prompts, max_new_tokens)
    if held and (cache is None or held >= min(len(prompt) for prompt in prompts)):
        raise ValueError(f"held={held}: the cache must be given, and every prompt longer")
    cache = cache if cache is not None else runner.allocate(len(prompts), length)
    seeds, vocabulary = sampling.seeds(len(prompts)), runner.config.vocab_size
    choose = runner.prepared(BatchSampler(sampling, seeds, runner.device, prompts, vocabulary), length + 1)
    tokens_BT, position_B = pad([prompt[held:] for prompt in prompts], runner.device)
    token_B1 = torch.empty(len(prompts), 1, dtype=torch.int64, device=runner.device)

    def launch(step: int) -> Tensor:
        if step == 0 and held:
            token_B, logits_BV = runner.extend(tokens_BT, torch.full_like(position_B, held), position_B, cache, choose)
            position_B.add_(held)
        elif step == 0:
            token_B, logits_BV = runner.start(tokens_BT, position_B, cache, choose)
        else:
            token_B, logits_BTV = runner.step(token_B1, position_B, cache, choose)
            logits_BV = logits_BTV[:, -1]
            position_B.add_(1)
        token_B1.copy_(token_B[:, None])  # a CUDA graph overwrites its outputs at the next replay
        choose.note(token_B1[:, 0])
        return token_B1 if logprobs is None else logprobs.columns(token_B1, logits_BV)

    ended = [False] * len(prompts)
    readback = Readback(runner.device)
    for step in range(max_new_tokens + readback.depth):
        if step < max_new_tokens:
            readback.push(launch(step))
        if step >= readback.depth:
            arrived = readback.pop()
            tokens = [int(columns[0]) for columns in arrived]
            if logprobs is not None:
                logprobs.take(arrived, ended)
            yield [None if done else token for token, done in zip(tokens, ended, strict=True)]
            ended = [done or token in eos_ids for token, done in zip(tokens, ended, strict=True)]
            if all(ended):
                return


def check(runner: Runner, prompts: Sequence[Sequence[int]], max_new_tokens: int, scoring: bool = False) -> int:
    """The positions that a request needs; ValueError, with the numbers, if it cannot be served.

    `scoring`: no new tokens are wanted.
    """
    return check_request(runner.config, prompts, max_new_tokens, scoring)


def check_request(
    config: LlamaConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, scoring: bool = False
) -> int:
    """As `check`, of a model that is not built yet."""
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


def check_cache(cache: KVCache, rows: int, positions: int) -> None:
    """TypeError for what is no cache, ValueError for one that is made for other requests."""
    made("cache", cache, "a cache, as runner.allocate() makes one", "layers", "length", "reserve")
    if cache.batch != rows:
        raise ValueError(f"cache: it is made for {cache.batch} rows, and there are {rows} prompts")
    if cache.capacity is not None and cache.capacity < positions:
        raise ValueError(f"cache: it has {cache.capacity} slots, and the request needs {positions}")


def pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts padded on the right to [B, T], and their lengths [B]; T >= 2, because a compiler makes 1 a case of its own."""
    width = max(2, *(len(prompt) for prompt in prompts))
    padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
    return torch.tensor(padded, device=device), torch.tensor([len(prompt) for prompt in prompts], device=device)


class Readback:
    """Rows of numbers on their way to the host, oldest first; on a CPU they are there at once."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self.depth = IN_FLIGHT if self._on_gpu else 0
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def push(self, rows_BN: Tensor) -> None:
        if not self._on_gpu:
            self._pending.append((rows_BN.clone(), None))
            return
        host_BN = torch.empty(
            rows_BN.shape, dtype=rows_BN.dtype, pin_memory=True
        )  # from PyTorch's pool of pinned blocks
        host_BN.copy_(rows_BN, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending.append((host_BN, arrived))

    def pop(self) -> list[list[Any]]:
        rows_BN, arrived = self._pending.popleft()
        if arrived is not None:
            arrived.synchronize()
        return rows_BN.tolist()  # type: ignore[no-any-return]

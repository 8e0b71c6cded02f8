"""A built model and its two phases: prefill, all prompts at once, and decode, a token or a few for every row.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llama_fast.choosing import Sampler
from llama_fast.contracts import KVCache, Phase, Shard
from llama_fast.engine.sampling import BatchSampler, Sampling
from llama_fast.model.llama import Llama
from llama_fast.plan import Plan
from llama_fast.processes import Answer
from llama_fast.weights import DecodedWeights
from llama_ref.arguments import whole
from llama_ref.checkpoint import Checkpoint
from llama_ref.config import LlamaConfig


def prefill(
    model: nn.Module,
    tokens_BT: Tensor,
    where: tuple[Tensor | None, Tensor | None],
    cache: KVCache,
    choose: Sampler,
) -> tuple[Tensor, Tensor]:
    """Phase one: all prompts at once, padded on the right, from their starts on (None: from position 0), and their lengths.

    The next token [B] and its logits [B, V] of each row; where no lengths are given, the logits [B, T, V] of all tokens.
    """
    start_B, lengths_B = where
    if lengths_B is None:
        logits_BTV = model(tokens_BT, start_B, cache)
        return logits_BTV[:, -1].argmax(-1), logits_BTV
    logits_BV = model(tokens_BT, start_B, cache, last_B=lengths_B - 1)[:, 0]
    return choose(logits_BV, lengths_B if start_B is None else start_B + lengths_B), logits_BV


def decode(
    model: nn.Module, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: Sampler
) -> tuple[Tensor, Tensor]:
    """Phase two: the tokens just chosen (T = 1) or proposed (T > 1). The next token [B] and all logits [B, T, V]."""
    logits_BTV = model(tokens_BT, start_B, cache)
    return choose(logits_BTV[:, -1], start_B + tokens_BT.shape[1]), logits_BTV


def prefill_on(
    model: nn.Module,
    tokens_BT: Tensor,
    where: tuple[Tensor | None, Tensor | None],
    cache: KVCache,
    choose: Sampler,
) -> tuple[Tensor, Tensor]:
    """Phase one of a stage before the last: the hidden states [B, T, D] of all tokens, twice."""
    x_BTD = model(tokens_BT, where[0], cache)
    return x_BTD, x_BTD


def decode_on(
    model: nn.Module, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: Sampler
) -> tuple[Tensor, Tensor]:
    """Phase two of a stage before the last."""
    x_BTD = model(tokens_BT, start_B, cache)
    return x_BTD, x_BTD


def phases_of(shard: Shard) -> tuple[Phase, Phase]:
    """The two phases as a process with this part of the model runs them."""
    _, ends = shard.ends
    return (prefill, decode) if ends else (prefill_on, decode_on)


@dataclass(frozen=True)
class Nothing:
    """The sampler of a stage that has no logits."""

    greedy: ClassVar[bool] = True
    code: ClassVar[tuple[object, ...]] = ("no logits",)

    def __call__(self, logits_BV: Tensor, position_B: Tensor) -> Tensor:
        raise AssertionError("a stage before the last chooses no token")


NOTHING = Nothing()


@dataclass(frozen=True)
class Runner:
    """A built model and its two phases. `config` holds the shapes of this process's shard.

    Of a model in stages every process makes the same calls, and gets the same answers.
    """

    checkpoint: Checkpoint
    config: LlamaConfig
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    model: Llama
    run_prefill: Phase
    run_decode: Phase

    def allocate(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` rows of up to `length` positions; ValueError beyond the model's context."""
        batch, length = whole("batch", batch, 1), whole("length", length, 1)
        if length > self.config.max_context:
            raise ValueError(f"{length} positions exceed the model's context of {self.config.max_context}")
        return self.plan.cache.allocate(self.config, batch, length, self.dtype, self.device)

    def start(
        self, tokens_BT: Tensor, lengths_B: Tensor, cache: KVCache, choose: BatchSampler
    ) -> tuple[Tensor, Tensor]:
        """Prefill: the first new token [B] and the logits [B, V] it was chosen from."""
        return self.begin_prompt(tokens_BT, (None, lengths_B), cache, choose)()

    def step(self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: BatchSampler) -> tuple[Tensor, Tensor]:
        """Decode: the next token [B] and the logits [B, T, V] of all T."""
        return self.begin_step(tokens_BT, start_B, cache, choose)()

    def extend(
        self, tokens_BT: Tensor, start_B: Tensor, lengths_B: Tensor, cache: KVCache, choose: BatchSampler
    ) -> tuple[Tensor, Tensor]:
        """Prefill behind the start_B positions that the cache already holds; `lengths_B` counts the new tokens.

        The next token [B] and its logits [B, V].
        """
        return self.begin_prompt(tokens_BT, (start_B, lengths_B), cache, choose)()

    @torch.no_grad()
    def begin_prompt(
        self, tokens_BT: Tensor, where: tuple[Tensor | None, Tensor], cache: KVCache, choose: BatchSampler
    ) -> Answer:
        """`start`, or `extend` where there is a start, of which the answer is not waited for."""
        start_B, lengths_B = where
        cache.reserve(torch.zeros_like(lengths_B) if start_B is None else start_B, tokens_BT.shape[1])
        answer = self.through(self.run_prefill, tokens_BT, where, cache, inside(choose))
        end_B = lengths_B if start_B is None else start_B + lengths_B
        return chosen_apart(answer, choose, end_B) if choose.is_apart else answer

    @torch.no_grad()
    def begin_step(self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: BatchSampler) -> Answer:
        """`step`, of which the answer is not waited for."""
        cache.reserve(start_B, tokens_BT.shape[1])
        answer = self.through(self.run_decode, tokens_BT, start_B, cache, inside(choose))
        return chosen_apart(answer, choose, start_B + tokens_BT.shape[1]) if choose.is_apart else answer

    def through(self, phase: Phase, tokens_BT: Tensor, where: Any, cache: KVCache, choose: BatchSampler) -> Answer:
        """A phase of this process's part of the model, between what the stage before gives and what the next one takes."""
        line = self.plan.shard.line
        if line is None:
            if self.plan.shard.ends != (True, True):
                raise ValueError(
                    f"{self.plan.shard}: a stage runs with the others, as `ranks.join` brings them together"
                )
            found = phase(self.model, tokens_BT, where, cache, choose)
            return lambda: found
        (B, T), D, V = tokens_BT.shape, self.config.dim, self.config.vocab_size
        given = tokens_BT if line.first else line.take(tokens_BT.new_empty((B, T, D), dtype=self.dtype))
        token_B, out = phase(self.model, given, where, cache, choose if line.last else NOTHING)
        if not line.last:
            line.give(out)
            of_last_tokens = isinstance(where, tuple) and where[1] is not None
            token_B = tokens_BT.new_empty(B)
            out = tokens_BT.new_empty((B, V) if of_last_tokens else (B, T, V), dtype=torch.float32)
        return line.tell(token_B, out)

    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor, cache: KVCache) -> Tensor:
        """The logits [B, V] at each row's last token."""
        return self.start(tokens_BT, lengths_B, cache, self.greedy(len(tokens_BT)))[1]

    def decode(self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache) -> Tensor:
        """The logits [B, T, V] of tokens at positions start_B, start_B + 1, ..."""
        return self.step(tokens_BT, start_B, cache, self.greedy(len(tokens_BT)))[1]

    @torch.no_grad()
    def score(self, tokens_BT: Tensor) -> Tensor:
        """The logits [B, T, V] of whole sequences."""
        B, T = tokens_BT.shape
        cache = self.allocate(B, T)
        cache.reserve(torch.zeros(B, dtype=torch.int64), T)
        return self.through(self.run_prefill, tokens_BT, (None, None), cache, self.greedy(B))()[1]

    def prepared(self, choose: BatchSampler, positions: int) -> BatchSampler:
        """`choose`, for requests of so many positions: where no compiler merges them, uniforms are hashed at once, and tokens
        chosen by the kernels that the plan has; where one does, code that was compiled stays.
        """
        choose.steady = self.plan.compiler.compiles_each_shape
        if choose.steady:
            choose.likeliest = self.greedy(1)
        else:
            choose.look_ahead(positions)
            choose.kernels = self.model.operations.sampling_kernels
        return choose

    def reference_weights(self) -> Mapping[str, Tensor]:
        """decode(encode(w)) under canonical names: what a reference must compute with to be comparable."""
        return DecodedWeights(self.checkpoint, self.plan, self.dtype, self.device)

    def greedy(self, batch: int) -> BatchSampler:
        """A sampler that takes the likeliest token of each row."""
        return BatchSampler(Sampling(), [0] * batch, self.device)


def inside(choose: BatchSampler) -> BatchSampler:
    """The sampler that a compiled step holds: one that takes the largest logit, if `choose` is asked behind the step."""
    if not choose.is_apart:
        return choose
    assert choose.likeliest is not None
    return choose.likeliest


def chosen_apart(answer: Answer, choose: BatchSampler, position_B: Tensor) -> Answer:
    """The answer with tokens that are chosen behind the step."""

    def chosen() -> tuple[Tensor, Tensor]:
        _, logits = answer()
        return choose(logits if logits.ndim == 2 else logits[:, -1], position_B), logits

    return chosen

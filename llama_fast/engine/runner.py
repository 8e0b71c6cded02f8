"""A built model and its two phases: prefill, all prompts at once, and decode, a token or a few for every row.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama_fast.choosing import Sampler
from llama_fast.contracts import KVCache, Phase
from llama_fast.engine.sampling import BatchSampler, Sampling
from llama_fast.model.llama import Llama
from llama_fast.plan import Plan
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


@dataclass(frozen=True)
class Runner:
    """A built model and its two phases. `config` holds the shapes of this process's shard."""

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

    @torch.no_grad()
    def start(
        self, tokens_BT: Tensor, lengths_B: Tensor, cache: KVCache, choose: BatchSampler
    ) -> tuple[Tensor, Tensor]:
        """Prefill: the first new token [B] and the logits [B, V] it was chosen from."""
        cache.reserve(torch.zeros_like(lengths_B), tokens_BT.shape[1])
        token_B, logits_BV = self.run_prefill(self.model, tokens_BT, (None, lengths_B), cache, inside(choose))
        return (choose(logits_BV, lengths_B) if choose.is_apart else token_B), logits_BV

    @torch.no_grad()
    def step(self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: BatchSampler) -> tuple[Tensor, Tensor]:
        """Decode: the next token [B] and the logits [B, T, V] of all T."""
        cache.reserve(start_B, tokens_BT.shape[1])
        token_B, logits_BTV = self.run_decode(self.model, tokens_BT, start_B, cache, inside(choose))
        if choose.is_apart:
            token_B = choose(logits_BTV[:, -1], start_B + tokens_BT.shape[1])
        return token_B, logits_BTV

    @torch.no_grad()
    def extend(
        self, tokens_BT: Tensor, start_B: Tensor, lengths_B: Tensor, cache: KVCache, choose: BatchSampler
    ) -> tuple[Tensor, Tensor]:
        """Prefill behind the start_B positions that the cache already holds; `lengths_B` counts the new tokens.

        The next token [B] and its logits [B, V].
        """
        cache.reserve(start_B, tokens_BT.shape[1])
        token_B, logits_BV = self.run_prefill(self.model, tokens_BT, (start_B, lengths_B), cache, inside(choose))
        return (choose(logits_BV, start_B + lengths_B) if choose.is_apart else token_B), logits_BV

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
        return self.run_prefill(self.model, tokens_BT, (None, None), cache, self.greedy(B))[1]

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

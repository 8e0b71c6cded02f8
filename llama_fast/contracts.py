"""What the slots of a Plan must offer. This file holds the Protocols, and nothing that implements one.

Shapes: B batch, T tokens, S cache slots, K key/value heads, d head width, V vocabulary, M rows of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llama_ref.config import LlamaConfig

Parts = Mapping[str, Tensor]
"""One matrix [out, in] as stored: {"weight": ...}, or {"weight": int8 [out, in], "scale": [out, 1]}; `out` comes first.

Where the model has biases there is a "bias" [out] besides, which encodings never see: the build adds it to their product.
"""

class Sampler(Protocol):
    """What chooses a token of each row: a `Sampling` made ready for so many rows on a device."""

    @property
    def greedy(self) -> bool:
        """Whether it takes the largest logit and looks at nothing else."""

    @property
    def code(self) -> tuple[object, ...]:
        """What of it changes the code: two samplers with equal values here run the same compiled graph."""

    def __call__(self, logits_BV: Tensor, position_B: Tensor) -> Tensor:
        """The token [B] that stands at `position_B`."""


Phase = Callable[..., tuple[Tensor, Tensor]]
"""Prefill or decode: (model, tokens [B, T], lengths or start [B], cache, choose) -> (next token [B], logits)."""


class Encoding(Protocol):
    """How matrices are stored, and how a stored matrix multiplies."""

    @property
    def name(self) -> str:
        """The word for it in flags and files, as "int8"."""

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """A matrix [out, in] as parts; `dtype` is the type the model will compute in."""

    def decode(self, parts: Parts) -> Tensor:
        """The matrix that `parts` stand for, exactly: stored scale x stored integer."""

    def linear(self, parts: Parts) -> nn.Module:
        """A module x [..., in] -> [..., out] over `parts`; packing for a kernel happens here."""

    def embedding(self, parts: Parts, dtype: torch.dtype) -> nn.Module:
        """A module ids [...] -> rows [..., in] in `dtype`, sharing storage with `linear(parts)` where the head is tied."""


class LayerCache(Protocol):
    """One block's keys and values; slot j holds position j."""

    def write(self, k_BTKd: Tensor, v_BTKd: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values at their positions; return all slots, (k_BKSd, v_BKSd)."""


class KVCache(Protocol):
    """The keys and values of a batch. Positions are arguments: writing one again replaces it, so nothing is ever reset."""

    layers: list[Any]  # LayerCache; Any because torch.compile guards on the concrete class

    @property
    def length(self) -> int:
        """Slots S that an attention over this cache sees."""

    def reserve(self, start_B: Tensor, T: int) -> None:
        """Make each row's slots up to start_B + T - 1 writable."""


class Cache(Protocol):
    """How keys and values are kept."""

    def allocate(
        self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """A cache for `batch` rows of up to `length` positions."""


class Compiler(Protocol):
    """What happens to the two phases before they run."""

    @property
    def compiles_each_shape(self) -> bool:
        """Whether a decode step of another number of tokens costs a compilation of its own, in tens of seconds."""

    @property
    def choosing(self) -> Choosing | None:
        """Kernels that choose tokens, of a compiler that has its own; None: `sampling` as it is written, compiled or not."""

    def compile(self, prefill: Phase, decode: Phase, model: nn.Module) -> tuple[Phase, Phase]:
        """The two functions, compiled or not; a compiler may instead compile the model's blocks in place of the whole."""


class AllReduce(Protocol):
    """How the partial results of all processes become one."""

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of x over all processes."""

    def add_product(self, a: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor) -> Tensor:
        """residual + the sum of (a @ weight.T) * scale, in the residual's type, for a step that is made of our kernels."""

    def in_kernels(self, rows: int, dim: int, vocab_size: int) -> bool:
        """Whether all that a step of so many rows says goes by kernels of ours, which can be compiled without being run."""


class Shard(Protocol):
    """Which part of every matrix this process holds."""

    @property
    def all_reduce(self) -> AllReduce:
        """Applied to what `wo` and `w2` give."""

    def local_config(self, config: LlamaConfig) -> LlamaConfig:
        """The shapes of this process's part; ValueError with the numbers where they do not divide."""

    def part(self, name: str, shape: Sequence[int], config: LlamaConfig) -> tuple[slice, ...]:
        """What this process holds of the tensor called `name`, as "layers.0.attention.wq": one slice for each axis."""

    def head(self, linear: nn.Module, vocab_size: int) -> nn.Module:
        """The module that gives every process all logits, where `linear` gives those of its part of "output"."""


class Choosing(Protocol):
    """Kernels that do in one launch each what is written below in many."""

    MOST_VOCABULARY: int

    def law(self, logits: Tensor, temperature: Tensor, top_k: int | None, min_p: Tensor | None) -> Tensor:
        """The distribution [M, V] of tokens with these logits."""

    def draw(self, p: Tensor, uniform: Tensor) -> Tensor:
        """As `draw`."""

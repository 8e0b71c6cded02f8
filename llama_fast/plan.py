"""A Plan is one value that says which optimisations to apply; its slots name kinds, and this file holds the plain kind of each.

    Plan()                                                       eager, dense, a cache that grows: the baseline
    Plan(encoding=Int8(), cache=Static(), compiler=Compiled())   the source's third rung

A slot holds exactly one value, so "int8 and int4 together" cannot be written. The optimised kinds are the leaves in
`llama_fast.optimisations`; they satisfy the Protocols below and no leaf imports another.

Shapes: B batch, T tokens, S cache slots, K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.matvec import product
from llama_fast.sampling import Choosing
from llama_ref.arguments import flag, made
from llama_ref.config import LlamaConfig

Parts = Mapping[str, Tensor]
"""One matrix [out, in] as stored: {"weight": ...}, or {"weight": int8 [out, in], "scale": [out, 1]}; `out` comes first.

Where the model has biases there is a "bias" [out] besides, which encodings never see: the build adds it to their product.
"""

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


class DenseLinear(nn.Module):
    """x @ weight.T."""

    def __init__(self, parts: Parts):
        super().__init__()
        self.weight = nn.Buffer(parts["weight"])

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


class DenseEmbedding(nn.Module):
    """The rows of a table."""

    def __init__(self, parts: Parts):
        super().__init__()
        self.weight = nn.Buffer(parts["weight"])

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


@dataclass(frozen=True)
class Dense:
    """Matrices in the type of the arithmetic."""

    name: str = field(default="dense", init=False)

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"weight": weight.to(dtype)}

    def decode(self, parts: Parts) -> Tensor:
        return parts["weight"]

    def linear(self, parts: Parts) -> nn.Module:
        return DenseLinear(parts)

    def embedding(self, parts: Parts, dtype: torch.dtype) -> nn.Module:
        return DenseEmbedding(parts)


class GrowingLayer:
    """Keys and values in tensors that are exchanged for longer ones as positions come."""

    def __init__(self, shape_BKSd: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.k = torch.zeros(shape_BKSd, dtype=dtype, device=device)
        self.v = torch.zeros(shape_BKSd, dtype=dtype, device=device)

    def grow(self, slots: int) -> None:
        pad = (0, 0, 0, slots)
        self.k, self.v = F.pad(self.k, pad), F.pad(self.v, pad)

    def write(self, k_BTKd: Tensor, v_BTKd: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        return write_at(self.k, k_BTKd, position_BT), write_at(self.v, v_BTKd, position_BT)


def write_at(slots_BKSd: Tensor, new_BTKd: Tensor, position_BT: Tensor) -> Tensor:
    """Put row b's token t into slot position_BT[b, t], in place; return the slots."""
    B, K = slots_BKSd.shape[:2]
    row_B11 = torch.arange(B, device=slots_BKSd.device)[:, None, None]
    head_K1 = torch.arange(K, device=slots_BKSd.device)[:, None]
    # All indices, on the tensor itself: a scatter, or an assignment through a transposed view, a compiler turns into a
    # copy of all slots.
    slots_BKSd[row_B11, head_K1, position_BT[:, None, :]] = new_BTKd.transpose(1, 2)
    return slots_BKSd


class GrowingCache:
    """As many slots as the longest row has positions."""

    def __init__(self, config: LlamaConfig, batch: int, dtype: torch.dtype, device: torch.device):
        shape = (batch, config.n_kv_heads, 0, config.head_dim)
        self.layers = [GrowingLayer(shape, dtype, device) for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        return self.layers[0].k.shape[2]

    def reserve(self, start_B: Tensor, T: int) -> None:
        missing = int(start_B.max()) + T - self.length
        if missing > 0:
            for layer in self.layers:
                layer.grow(missing)


@dataclass(frozen=True)
class Growing:
    """A cache reallocated for every token: what an eager implementation does first."""

    def allocate(
        self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        return GrowingCache(config, batch, dtype, device)


@dataclass(frozen=True)
class Eager:
    """Run the two phases as written."""

    compiles_each_shape: ClassVar[bool] = False
    choosing: ClassVar[None] = None

    def compile(self, prefill: Phase, decode: Phase, model: nn.Module) -> tuple[Phase, Phase]:
        return prefill, decode


class Alone:
    """The sum over one process."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def add_product(self, a: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor) -> Tensor:
        return (residual + product(a, weight, scale)).type_as(residual)

    def in_kernels(self, rows: int, dim: int, vocab_size: int) -> bool:
        return True


@dataclass(frozen=True)
class Whole:
    """One process holds everything."""

    all_reduce: AllReduce = field(default_factory=Alone, init=False, repr=False, compare=False)

    def __str__(self) -> str:
        return "whole"

    def local_config(self, config: LlamaConfig) -> LlamaConfig:
        return config

    def part(self, name: str, shape: Sequence[int], config: LlamaConfig) -> tuple[slice, ...]:
        return (slice(None),) * len(shape)

    def head(self, linear: nn.Module, vocab_size: int) -> nn.Module:
        return linear


@dataclass(frozen=True)
class Plan:
    """Which optimisations to apply. The default is the baseline: nothing."""

    encoding: Encoding = field(default_factory=Dense)
    cache: Cache = field(default_factory=Growing)
    compiler: Compiler = field(default_factory=Eager)
    shard: Shard = field(default_factory=Whole)
    fuse_projections: bool = False
    """q, k, v as one matrix and gate, up as another: fewer, larger products of the same numbers."""

    def __post_init__(self) -> None:
        made("encoding", self.encoding, "an encoding, as Dense() or Int8()", "encode", "decode", "linear", "embedding")
        made("cache", self.cache, "a kind of cache, as Growing() or Static()", "allocate")
        made(
            "compiler", self.compiler, "a compiler, as Eager(), Compiled() or Fused()", "compile", "compiles_each_shape"
        )
        made("shard", self.shard, "a shard, as Whole() or TensorParallel(rank, size)", "local_config", "part", "head")
        object.__setattr__(self, "fuse_projections", flag("fuse_projections", self.fuse_projections))

    def __str__(self) -> str:
        """As "dense · growing · eager · whole"."""
        words = [
            self.encoding.name,
            *(type(slot).__name__.lower() for slot in (self.cache, self.compiler)),
            str(self.shard),
        ]
        return " · ".join([*words, "fused projections"] if self.fuse_projections else words)

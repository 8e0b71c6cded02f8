"""What the slots of a Plan must offer. This file holds the Protocols, and nothing that implements one.

Shapes: B batch, T tokens, S cache slots, K key/value heads, d head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llama_fast.choosing import SamplingKernels
from llama_fast.processes import AllReduce, Line
from llama_fast.step import Step
from llama_ref.checkpoint import TensorSource
from llama_ref.config import LlamaConfig

Parts = Mapping[str, Tensor]
"""The tensors of one stored matrix [out, in] by name: {"weight": ...}, or {"weight": int8 [out, in], "scale": [out, 1]}.

The first axis of every part is `out`, so that matrices of one input are joined by joining their parts; or 1, where all rows share
one, as an order of columns: joined matrices then have the same.
"""

PartLayout = tuple[tuple[int, ...], torch.dtype | None]
"""A part's shape and type; None: any floating type."""

Cut = tuple[slice, ...]
"""Which part of a tensor a process holds: one slice for each axis."""


Phase = Callable[..., tuple[Tensor, Tensor]]
"""One of the two phases of generation, over (model, tokens [B, T], where, cache, sampler) -> (next token [B], logits).

Prefill: `where` is (start [B] or None for 0, lengths [B]); logits [B, V] at each row's last token, or [B, T, V] where the lengths
are None. Decode: `where` is the start [B] of the T tokens; logits [B, T, V].
"""


class Encoding(Protocol):
    """How matrices are stored, and how a stored matrix multiplies. An encoding is one file."""

    @property
    def name(self) -> str:
        """The word for it in flags and files, as "int8"."""

    @property
    def loader(self) -> str:
        """The name in `kernels.stored.LOADERS` of what reads its parts in our kernels, as "rows"; "": they read none of it."""

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        """The parts of a stored matrix [out, in]; ValueError, with numbers, for a matrix that it cannot hold."""

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """A matrix [out, in] as parts; `dtype` is the type the model will compute in."""

    def decode(self, parts: Parts) -> Tensor:
        """The matrix that `parts` stand for, exactly: stored scale x stored integer."""

    def cut(self, parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
        """The parts of some rows and columns of a matrix of this shape; ValueError, with numbers, for a cut through a group."""

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        """x [..., in] @ matrix.T: [..., out] in x's type."""

    def rows(self, ids: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The matrix's rows [..., in] at ids [...], in `dtype`: an embedding."""


class Operations(Protocol):
    """The five steps of a block, and the two ends of a model, as one model's `Arithmetic` computes them."""

    @property
    def compilable(self) -> bool:
        """Whether a compiler can read them: PyTorch's operators, and nothing that is launched by hand."""

    @property
    def needs_joined(self) -> bool:
        """Whether projections of one input must be one matrix."""

    @property
    def sampling_kernels(self) -> SamplingKernels | None:
        """Kernels that choose tokens, or None to sample with PyTorch."""

    def place(self, rope_table: Tensor, tokens_BT: Tensor, start_B: Tensor | None, cache: KVCache) -> Step:
        """What is the same for all blocks: positions, masks, angles."""

    def embed(self, tokens_BT: Tensor, embedding: nn.Module | None) -> Tensor:
        """The tokens' rows of the table, [B, T, D]; without a table they are hidden states [B, T, D] of the stage before."""

    def qkv(self, x_BTD: Tensor, norm: nn.Module, matrix: nn.Module, layer: LayerCache, step: Step) -> Tensor:
        """Norm, the three projections, rotation; keys and values go to the cache. The queries [B, T, H, d]."""

    def attend(self, q_BTHd: Tensor, layer: LayerCache, step: Step) -> Tensor:
        """Attention over what the cache holds for these tokens, [B, T, H, d]."""

    def add(self, a_BTK: Tensor, matrix: nn.Module, x_BTD: Tensor, step: Step) -> Tensor:
        """x plus the product, summed over all processes, [B, T, D]; it may be written over x."""

    def gated(self, x_BTD: Tensor, norm: nn.Module, matrix: nn.Module, step: Step) -> Tensor:
        """Norm, then silu(gate) * up, [B, T, F]."""

    def head(self, x_BTD: Tensor, norm: nn.Module, matrix: nn.Module, step: Step) -> Tensor:
        """Norm, then the logits, float32 [B, T, V]."""

    def choose_tiles(self, run: Callable[[], object], rows: int, weight_bytes: int) -> None:
        """Find out how kernels are best cut for a pass of so many rows over a model of so many bytes, if nobody knows.

        `run` is such a pass over some of its blocks; it may be called often.
        """

    def compile_ahead(self, run: Callable[[], object], rows: int) -> None:
        """Compile side by side what a first `run`, a pass of so many rows over one block, would compile piece by piece."""


class Slots(Protocol):
    """A plan, as its arithmetic may see it."""

    @property
    def cache(self) -> Cache: ...

    @property
    def shard(self) -> Shard: ...

    @property
    def fuse_projections(self) -> bool: ...


class Arithmetic(Protocol):
    """How a model computes: with PyTorch's operators, or with kernels of our own."""

    @property
    def name(self) -> str:
        """The word for it in a plan's description; "" for PyTorch's."""

    def bind(self, config: LlamaConfig, slots: Slots, device: torch.device) -> Operations:
        """The operations of one model under a plan; ValueError, by name, for what they cannot compute."""


class LayerCache(Protocol):
    """One block's keys and values; slot j holds position j."""

    @property
    def k(self) -> Tensor:
        """The keys of all slots, [B, K, S, d]."""

    @property
    def v(self) -> Tensor:
        """The values of all slots, [B, K, S, d]."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds, as it is stored."""

    def put(self, k_BTKd: Tensor, v_BTKd: Tensor, position_BT: Tensor) -> None:
        """Store the new keys and values at their positions."""


class KVCache(Protocol):
    """The keys and values of a batch. Positions are arguments: writing one again replaces it, so nothing is ever reset."""

    layers: list[Any]  # LayerCache; Any because torch.compile guards on the concrete class

    @property
    def batch(self) -> int:
        """Rows that it is made for."""

    @property
    def length(self) -> int:
        """Slots S that an attention over this cache sees."""

    @property
    def capacity(self) -> int | None:
        """Positions that a row may have; None: as many as come."""

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""

    def reserve(self, start_B: Tensor, T: int) -> None:
        """Make each row's slots up to start_B + T - 1 writable."""

    def rows(self, first: int, count: int) -> KVCache:
        """Some of the rows as a cache: what is written there is written here, and no other row is touched.

        It is the same object every time, so that what was recorded for it is found again.
        """


class Cache(Protocol):
    """How keys and values are kept."""

    @property
    def plain_slots(self) -> bool:
        """Whether a layer's `k` and `v` are what is stored, in the type of the arithmetic, so that a kernel may write to them."""

    @property
    def fixed_addresses(self) -> bool:
        """Whether a cache stays where it was allocated: as recorded code needs it, and worth keeping for the next request."""

    def allocate(
        self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """A cache for `batch` rows of up to `length` positions."""


class Compiler(Protocol):
    """What happens to the two phases before they run."""

    @property
    def records_addresses(self) -> bool:
        """Whether compiled code finds the cache at the addresses that it had when it was recorded."""

    @property
    def compiles_each_shape(self) -> bool:
        """Whether a decode step of another number of tokens costs a compilation of its own, in tens of seconds."""

    def compile(self, prefill: Phase, decode: Phase, model: Any) -> tuple[Phase, Phase]:
        """The two functions, compiled or not; a compiler may instead compile the model's blocks in place of the whole."""


class Shard(Protocol):
    """Which part of the model this process holds: of every layer, or of some."""

    @property
    def all_reduce(self) -> AllReduce:
        """Applied to what `wo` and `w2` give."""

    @property
    def everyone(self) -> AllReduce:
        """A sum over all processes of the plan, those of other stages included."""

    @property
    def line(self) -> Line | None:
        """The way between stages; None: the model is in one piece."""

    @property
    def ends(self) -> tuple[bool, bool]:
        """Whether this process embeds tokens, and whether it makes logits."""

    def layers(self, config: LlamaConfig) -> range:
        """The layers that this process holds, at least one; `config` is the whole model's. ValueError where there are too few."""

    def local_config(self, config: LlamaConfig) -> LlamaConfig:
        """The shapes of this process's part; ValueError with the numbers where they do not divide."""

    def part(self, name: str, shape: Sequence[int], config: LlamaConfig) -> tuple[slice, ...]:
        """What this process holds of the tensor called `name`, as "layers.0.attention.wq": one slice for each axis, the first
        of them empty where it holds nothing. `config` is the whole model's.
        """

    def head(self, linear: nn.Module, vocab_size: int) -> nn.Module:
        """The module that gives every process all logits, where `linear` gives those of its part of "output"."""

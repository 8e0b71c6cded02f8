"""A cache allocated once. Unlike the growing one its addresses and shapes never change, so code compiled for it, and a
CUDA graph that recorded it, stay valid; slots not yet written are masked out by the model.

Shapes: B batch, S slots, K key/value heads, d head width, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llama_fast.caches.writing import write_at
from llama_fast.contracts import KVCache
from llama_ref.arguments import whole
from llama_ref.config import LlamaConfig


class StaticLayer:
    """Keys and values in two tensors [B, K, S, d] that are written in place for ever."""

    def __init__(self, shape_BKSd: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.k = torch.zeros(shape_BKSd, dtype=dtype, device=device)  # zeros: whatever a masked slot holds is
        self.v = torch.zeros(shape_BKSd, dtype=dtype, device=device)  # multiplied by 0, and 0 x NaN is NaN

    def put(self, k_BTKd: Tensor, v_BTKd: Tensor, position_BT: Tensor) -> None:
        write_at(self.k, k_BTKd, position_BT)
        write_at(self.v, v_BTKd, position_BT)


class StaticCache:
    """S slots a row, all there from the start."""

    def __init__(self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device):
        self.batch, self.length, self.capacity = batch, length, length
        shape = (batch, config.n_kv_heads, length, config.head_dim)
        self.layers = [StaticLayer(shape, dtype, device) for _ in range(config.n_layers)]

    @property
    def nbytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)

    def reserve(self, start_B: Tensor, T: int) -> None:
        """Nothing to do, and no look at `start_B`: a GPU may still be computing it."""


@dataclass(frozen=True)
class Static:
    """A cache of `length` slots, or of what a request needs rounded up to a multiple of `multiple`."""

    length: int | None = None
    multiple: int = 256
    fixed_addresses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", None if self.length is None else whole("length", self.length))
        object.__setattr__(self, "multiple", whole("multiple", self.multiple))
        if self.multiple < 1 or (self.length is not None and self.length < 1):
            raise ValueError(f"a static cache needs at least one slot: length={self.length}, multiple={self.multiple}")

    def allocate(
        self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Raises ValueError where the request is longer than `length`."""
        rounded = min(-(-length // self.multiple) * self.multiple, max(config.max_context, length))
        slots = rounded if self.length is None else self.length
        if length > slots:
            raise ValueError(f"{length} positions do not fit a static cache of {slots}")
        return StaticCache(config, batch, slots, dtype, device)

"""A cache allocated once. Unlike the growing one its addresses and shapes never change, so code compiled for it, and a
CUDA graph that recorded it, stay valid; slots not yet written are masked out by the model.

Shapes: B batch, S slots, K key/value heads, d head width, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llama_fast.caches.eight_bits import EightBitLayer, known
from llama_fast.caches.writing import write_at
from llama_fast.contracts import KVCache
from llama_ref.arguments import whole
from llama_ref.config import LlamaConfig


class StaticLayer:
    """Keys and values in two tensors [B, K, S, d] that are written in place for ever."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k, self.v

    def put(self, k_BTKd: Tensor, v_BTKd: Tensor, position_BT: Tensor) -> None:
        write_at(self.k, k_BTKd, position_BT)
        write_at(self.v, v_BTKd, position_BT)

    def rows(self, part: slice) -> StaticLayer:
        """Some rows of it."""
        return StaticLayer(self.k[part], self.v[part])

    def beside(self, width: int, dtype: torch.dtype) -> StaticLayer:
        """A layer with the same slots for vectors of another width and type."""
        return StaticLayer(*(tensor.new_zeros(*tensor.shape[:-1], width, dtype=dtype) for tensor in self.tensors))


class StaticCache:
    """S slots a row, all there from the start."""

    def __init__(self, layers: Sequence[Any]):
        self.batch, _, self.length, _ = layers[0].tensors[0].shape
        self.capacity = self.length
        self.layers = list(layers)
        self._parts: dict[tuple[int, int], StaticCache] = {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    def reserve(self, start_B: Tensor, T: int) -> None:
        """Nothing to do, and no look at `start_B`: a GPU may still be computing it."""

    def rows(self, first: int, count: int) -> StaticCache:
        assert 0 <= first < first + count <= self.batch
        if (first, count) not in self._parts:
            part = slice(first, first + count)
            self._parts[first, count] = StaticCache([layer.rows(part) for layer in self.layers])
        return self._parts[first, count]


@dataclass(frozen=True)
class Static:
    """A cache of `length` slots, or of what a request needs rounded up to a multiple of `multiple`.

    bits: 8 keeps keys and values in so many; None: in the type of the arithmetic.
    """

    length: int | None = None
    multiple: int = 256
    bits: int | None = None
    fixed_addresses: ClassVar[bool] = True

    @property
    def plain_slots(self) -> bool:
        return self.bits is None

    def __post_init__(self) -> None:
        known(self.bits)
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
        shape = (batch, config.n_kv_heads, slots, config.head_dim)

        def zeros() -> Tensor:  # not empty: whatever a masked slot holds is multiplied by 0, and 0 x NaN is NaN
            return torch.zeros(shape, dtype=dtype if self.bits is None else torch.int8, device=device)

        layers = (StaticLayer(zeros(), zeros()) for _ in range(config.n_layers))
        return StaticCache([*layers] if self.bits is None else [EightBitLayer(layer, dtype) for layer in layers])

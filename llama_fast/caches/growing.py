"""A cache that is reallocated for every token: what an eager implementation does first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.caches.writing import write_at
from llama_fast.contracts import KVCache
from llama_ref.config import LlamaConfig


class GrowingLayer:
    """Keys and values in tensors that are exchanged for longer ones as positions come."""

    def __init__(self, shape_BKSd: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.k = torch.zeros(shape_BKSd, dtype=dtype, device=device)
        self.v = torch.zeros(shape_BKSd, dtype=dtype, device=device)

    def grow(self, slots: int) -> None:
        pad = (0, 0, 0, slots)
        self.k, self.v = F.pad(self.k, pad), F.pad(self.v, pad)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k, self.v

    def put(self, k_BTKd: Tensor, v_BTKd: Tensor, position_BT: Tensor) -> None:
        write_at(self.k, k_BTKd, position_BT)
        write_at(self.v, v_BTKd, position_BT)


class RowsOfLayer(GrowingLayer):
    """Some rows of such a layer, cut out of its tensors of the moment."""

    def __init__(self, layer: GrowingLayer, part: slice):
        self.layer, self.part = layer, part

    @property
    def k(self) -> Tensor:  # type: ignore[override]
        return self.layer.k[self.part]

    @property
    def v(self) -> Tensor:  # type: ignore[override]
        return self.layer.v[self.part]

    def grow(self, slots: int) -> None:
        self.layer.grow(slots)


class GrowingCache:
    """As many slots as the longest row has positions. Where one row needs more, all get them."""

    def __init__(self, layers: Sequence[GrowingLayer], batch: int):
        self.batch, self.capacity = batch, None
        self.layers = list(layers)
        self._parts: dict[tuple[int, int], GrowingCache] = {}

    @property
    def length(self) -> int:
        return self.layers[0].k.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    def reserve(self, start_B: Tensor, T: int) -> None:
        missing = int(start_B.max()) + T - self.length
        if missing > 0:
            for layer in self.layers:
                layer.grow(missing)

    def rows(self, first: int, count: int) -> GrowingCache:
        assert 0 <= first < first + count <= self.batch
        if (first, count) not in self._parts:
            part = slice(first, first + count)
            self._parts[first, count] = GrowingCache([RowsOfLayer(layer, part) for layer in self.layers], count)
        return self._parts[first, count]


@dataclass(frozen=True)
class Growing:
    """A cache reallocated for every token: what an eager implementation does first."""

    plain_slots: ClassVar[bool] = True
    fixed_addresses: ClassVar[bool] = False

    def allocate(
        self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        shape = (batch, config.n_kv_heads, 0, config.head_dim)
        return GrowingCache([GrowingLayer(shape, dtype, device) for _ in range(config.n_layers)], batch)

"""A cache that is reallocated for every token: what an eager implementation does first."""

from __future__ import annotations

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

    def put(self, k_BTKd: Tensor, v_BTKd: Tensor, position_BT: Tensor) -> None:
        write_at(self.k, k_BTKd, position_BT)
        write_at(self.v, v_BTKd, position_BT)


class GrowingCache:
    """As many slots as the longest row has positions."""

    def __init__(self, config: LlamaConfig, batch: int, dtype: torch.dtype, device: torch.device):
        self.batch = batch
        self.capacity = None
        shape = (batch, config.n_kv_heads, 0, config.head_dim)
        self.layers = [GrowingLayer(shape, dtype, device) for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        return self.layers[0].k.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)

    def reserve(self, start_B: Tensor, T: int) -> None:
        missing = int(start_B.max()) + T - self.length
        if missing > 0:
            for layer in self.layers:
                layer.grow(missing)


@dataclass(frozen=True)
class Growing:
    """A cache reallocated for every token: what an eager implementation does first."""

    fixed_addresses: ClassVar[bool] = False

    def allocate(
        self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        return GrowingCache(config, batch, dtype, device)

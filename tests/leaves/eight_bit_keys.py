"""Keys and values in eight bits, a scale for each: half of bf16's bytes. Read whole, they are floating again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llama_fast.caches.writing import write_at
from llama_fast.contracts import KVCache
from llama_ref.config import LlamaConfig


class EightBitLayer:
    def __init__(self, shape_BKSd: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.dtype = dtype
        whole = torch.zeros(2, *shape_BKSd, dtype=torch.int8, device=device)
        scale = torch.zeros(2, *shape_BKSd[:3], 1, dtype=torch.float32, device=device)
        self.tensors = whole[0], whole[1], scale[0], scale[1]

    @property
    def k(self) -> Tensor:
        return (self.tensors[0] * self.tensors[2]).to(self.dtype)

    @property
    def v(self) -> Tensor:
        return (self.tensors[1] * self.tensors[3]).to(self.dtype)

    def put(self, k_BTKd: Tensor, v_BTKd: Tensor, position_BT: Tensor) -> None:
        for new, whole, scale in ((k_BTKd, *self.tensors[::2]), (v_BTKd, *self.tensors[1::2])):
            step = (new.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
            write_at(whole, (new.float() / step).round().to(torch.int8), position_BT)
            write_at(scale, step, position_BT)


class EightBitCache:
    def __init__(self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device):
        self.batch, self.length, self.capacity = batch, length, length
        shape = (batch, config.n_kv_heads, length, config.head_dim)
        self.layers = [EightBitLayer(shape, dtype, device) for _ in range(config.n_layers)]
        self.nbytes = sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    def reserve(self, start_B: Tensor, T: int) -> None: ...


@dataclass(frozen=True)
class EightBitKeys:
    plain_slots: ClassVar[bool] = False
    fixed_addresses: ClassVar[bool] = True

    def allocate(
        self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        return EightBitCache(config, batch, length, dtype, device)

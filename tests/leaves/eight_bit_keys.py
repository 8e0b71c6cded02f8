"""Keys and values in eight bits, a scale for each: half of bf16's bytes. Read whole, they are floating again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llama_fast.caches.writing import write_at
from llama_fast.contracts import KVCache
from llama_ref.config import LlamaConfig


class EightBitLayer:
    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype):
        self.tensors, self.dtype = tuple(tensors), dtype

    @property
    def k(self) -> Tensor:
        return (self.tensors[0] * self.tensors[2]).to(self.dtype)

    @property
    def v(self) -> Tensor:
        return (self.tensors[1] * self.tensors[3]).to(self.dtype)

    def put(self, k_BTKd: Tensor, v_BTKd: Tensor, position_BT: Tensor) -> None:
        for new, whole, scale in zip((k_BTKd, v_BTKd), self.tensors[:2], self.tensors[2:]):
            step = (new.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
            write_at(whole, (new.float() / step).round().to(torch.int8), position_BT)
            write_at(scale, step, position_BT)


class EightBitCache:
    def __init__(self, layers: Sequence[EightBitLayer]):
        (self.batch, _, self.length, _), self.layers = layers[0].tensors[0].shape, list(layers)
        self.capacity, self._parts = self.length, {}  # type: ignore[var-annotated]
        self.nbytes = sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    def reserve(self, start_B: Tensor, T: int) -> None: ...
    def rows(self, first: int, count: int) -> KVCache:
        cut = [EightBitLayer([t[first : first + count] for t in at.tensors], at.dtype) for at in self.layers]
        return self._parts.setdefault((first, count), EightBitCache(cut))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class EightBitKeys:
    plain_slots: ClassVar[bool] = False
    fixed_addresses: ClassVar[bool] = True

    def allocate(
        self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        shape, width = (batch, config.n_kv_heads, length), config.head_dim
        kinds = ((width, torch.int8), (width, torch.int8), (1, torch.float32), (1, torch.float32))
        made = ([torch.zeros(*shape, d, dtype=of, device=device) for d, of in kinds] for _ in range(config.n_layers))
        return EightBitCache([EightBitLayer(tensors, dtype) for tensors in made])

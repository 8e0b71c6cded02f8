"""Dense weights: matrices in the type of the arithmetic, which is the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.contracts import Cut, PartLayout, Parts
from llama_fast.encodings.cutting import cut_along_axes
from llama_fast.model.matvec import product
from llama_ref.checkpoint import TensorSource


@dataclass(frozen=True)
class Dense:
    """Matrices in the type of the arithmetic."""

    name: str = field(default="dense", init=False)
    loader: ClassVar[str] = "rows"

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        return {"weight": (tuple(shape), None)}

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"weight": weight.to(dtype)}

    def decode(self, parts: Parts) -> Tensor:
        return parts["weight"]

    def cut(self, parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
        return cut_along_axes(parts, shape, cut)

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        return product(x, parts["weight"])

    def rows(self, ids: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, parts["weight"])


ENCODINGS = (Dense(),)

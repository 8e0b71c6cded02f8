"""Half-precision weights that stay so beneath an arithmetic of another type: each number is widened where it is multiplied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llama_fast.contracts import Cut, PartLayout, Parts
from llama_fast.encodings.cutting import cut_along_axes
from llama_fast.model.matvec import product, product_by_slices
from llama_ref.checkpoint import TensorSource


@dataclass(frozen=True)
class Halves:
    """`dtype`: torch.float16 or torch.bfloat16."""

    dtype: torch.dtype
    loader: ClassVar[str] = ""

    @property
    def name(self) -> str:
        return {torch.float16: "f16", torch.bfloat16: "bf16"}[self.dtype]

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        return {"weight": (tuple(shape), self.dtype)}

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"weight": weight.to(self.dtype)}

    def decode(self, parts: Parts) -> Tensor:
        """Float32 [out, in]."""
        return parts["weight"].float()

    def cut(self, parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
        return cut_along_axes(parts, shape, cut)

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        """The widened matrix's, some rows of it at a time."""
        weight = parts["weight"]
        if x.dtype is weight.dtype or torch.compiler.is_compiling():
            return product(x, weight)
        return product_by_slices(x, weight.shape[0], lambda rows: weight[rows].float())

    def rows(self, ids: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        return parts["weight"][ids].to(dtype)


STORED = (Halves(torch.float16), Halves(torch.bfloat16))

"""Half-precision weights that stay so beneath an arithmetic of another type: each number is widened where it is multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llama_fast.contracts import PartLayout, Parts
from llama_fast.encodings.decoding import Decoding
from llama_fast.model.matvec import product


@dataclass(frozen=True)
class Halves(Decoding):
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

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        """The widened matrix's, some rows of it at a time."""
        weight = parts["weight"]
        if x.dtype is weight.dtype or torch.compiler.is_compiling():
            return product(x, weight)
        return super().product(x, parts)


STORED = (Halves(torch.float16), Halves(torch.bfloat16))

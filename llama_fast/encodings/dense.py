"""Dense weights: matrices in the type of the arithmetic, which is the baseline."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.contracts import Parts
from llama_fast.model.matvec import product


class DenseLinear(nn.Module):
    """x @ weight.T."""

    def __init__(self, parts: Parts):
        super().__init__()
        self.weight = nn.Buffer(parts["weight"])

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


class DenseEmbedding(nn.Module):
    """The rows of a table."""

    def __init__(self, parts: Parts):
        super().__init__()
        self.weight = nn.Buffer(parts["weight"])

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


@dataclass(frozen=True)
class Dense:
    """Matrices in the type of the arithmetic."""

    name: str = field(default="dense", init=False)

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"weight": weight.to(dtype)}

    def decode(self, parts: Parts) -> Tensor:
        return parts["weight"]

    def linear(self, parts: Parts) -> nn.Module:
        return DenseLinear(parts)

    def embedding(self, parts: Parts, dtype: torch.dtype) -> nn.Module:
        return DenseEmbedding(parts)

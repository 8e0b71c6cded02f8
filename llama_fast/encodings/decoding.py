"""What encodings share that multiply by the decoded matrix, some rows of it at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llama_fast.contracts import Cut, Parts
from llama_fast.encodings.cutting import cut_along_axes
from llama_fast.model.matvec import product_by_slices
from llama_ref.checkpoint import TensorSource


class Decoding(ABC):
    """Products and rows of whatever `decode` gives; cut along the matrix's axes, which every part has."""

    @abstractmethod
    def decode(self, parts: Parts) -> Tensor:
        """The matrix [out, in], or, of some rows of every part, these."""

    def cut(self, parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
        return cut_along_axes(parts, shape, cut)

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        return product_by_slices(x, parts["weight"].shape[0], lambda rows: self.decode(rows_of(parts, rows)))

    def rows(self, ids: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        flat = {name: part[ids.reshape(-1)] for name, part in parts.items()}
        return self.decode(flat).to(dtype).view(*ids.shape, -1)


def rows_of(parts: Parts, rows: slice) -> dict[str, Tensor]:
    """The same parts of some rows of the matrix."""
    return {name: part[rows] for name, part in parts.items()}

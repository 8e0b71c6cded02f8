"""Stored matrices, and the modules that they become: products with one, or with several of one input, and rows of a table.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.contracts import Encoding, Parts


@dataclass(frozen=True, eq=False)
class Stored:
    """One matrix of shape [out, in] (or a norm's vector) as this process stores it: one value from the checkpoint to the kernel.

    Where the model has biases, `bias` [out] is added to the product; encodings never see it. Nor do they see `low_rank`, an
    adapter's up [out, r] and down [r, in] in float32, whose product is added to the matrix.
    """

    encoding: Encoding
    shape: tuple[int, ...]
    parts: Parts
    bias: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parts and the bias by name: what is written to a file."""
        return dict(self.parts) if self.bias is None else {**self.parts, "bias": self.bias}


class Matrix(nn.Module):
    """x @ matrix.T, plus an adapter's x @ down.T @ up.T and the bias where there are any."""

    def __init__(self, stored: Stored):
        super().__init__()
        self.encoding: Encoding = stored.encoding
        self.names = tuple(stored.parts)
        for name, tensor in stored.parts.items():
            self.register_buffer(name, tensor)
        self.bias: Tensor | None
        self.register_buffer("bias", stored.bias)
        up, down = stored.low_rank or (None, None)
        self.adapter_up: Tensor | None
        self.adapter_down: Tensor | None
        self.register_buffer("adapter_up", up)
        self.register_buffer("adapter_down", down)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by name, as the encoding knows them."""
        return {name: getattr(self, name) for name in self.names}

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoding.product(x, self.parts)
        if self.adapter_up is not None and self.adapter_down is not None:
            wide = x.to(self.adapter_down.dtype)
            y = (y + F.linear(F.linear(wide, self.adapter_down), self.adapter_up)).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Table(Matrix):
    """The rows of a matrix at some ids: an embedding, of the same storage as a head that is tied to it."""

    def __init__(self, stored: Stored, dtype: torch.dtype):
        super().__init__(stored)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoding.rows(ids, self.parts, self.dtype)


class Separate(nn.Module):
    """Several projections of one input, each its own product."""

    def __init__(self, several: Sequence[Stored], matrix: Callable[[Stored], Matrix] = Matrix):
        super().__init__()
        self.linears = nn.ModuleList(matrix(stored) for stored in several)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.linears)


class Joined(nn.Module):
    """Several projections of one input as one product, cut apart afterwards."""

    def __init__(self, several: Sequence[Stored], matrix: Callable[[Stored], Matrix] = Matrix):
        super().__init__()
        self.linear = matrix(joined(several))
        self.sizes = [stored.shape[0] for stored in several]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.linear(x).split(self.sizes, -1))


class SplitHead(nn.Module):
    """A head that holds some rows of the vocabulary; `gather` makes all logits [..., V] of these [..., rows held]."""

    def __init__(self, linear: nn.Module, gather: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear = linear
        self.gather = gather

    def forward(self, x: Tensor) -> Tensor:
        return self.gather(self.linear(x))


def apart(several: Sequence[Stored]) -> str:
    """Why matrices of one input cannot be joined: "stored as int4, int8", or in orders that differ; "" if they can."""
    first = several[0]
    if any(stored.encoding != first.encoding for stored in several):
        return "stored as " + ", ".join(stored.encoding.name for stored in several)
    shared = [name for name, part in first.parts.items() if is_shared(part, first)]
    if any(not torch.equal(stored.parts[name], first.parts[name]) for stored in several for name in shared):
        return "with columns in orders that differ"
    return ""


def is_shared(part: Tensor, stored: Stored) -> bool:
    """Whether all rows of a matrix share a part, as the order of columns [1, in]."""
    return part.shape[0] == 1 != stored.shape[0]


def joined(several: Sequence[Stored]) -> Stored:
    """Matrices of one input as one: every part, and the bias, is joined along its first axis, `out`; one that all rows
    share must be the same in all.
    """
    first, why = several[0], apart(several)
    if why:
        raise ValueError(f"projections {why} cannot be joined: take Plan(fuse_projections=False)")
    parts = {
        name: part if is_shared(part, first) else torch.cat([stored.parts[name] for stored in several])
        for name, part in first.parts.items()
    }
    biases = [stored.bias for stored in several if stored.bias is not None]
    shape = (sum(stored.shape[0] for stored in several), *first.shape[1:])
    return Stored(first.encoding, shape, parts, torch.cat(biases) if biases else None, _joined_pairs(several))


def _joined_pairs(several: Sequence[Stored]) -> tuple[Tensor, Tensor] | None:
    """The pairs of matrices of one input as one: the thin matrices that meet the input stacked, the others along a diagonal."""
    found = [stored.low_rank for stored in several if stored.low_rank is not None]
    if not found:
        return None
    none = found[0][1].new_empty(0, several[0].shape[1])
    pairs = [stored.low_rank or (none.new_empty(stored.shape[0], 0), none) for stored in several]
    return torch.block_diag(*(up for up, _ in pairs)), torch.cat([down for _, down in pairs])

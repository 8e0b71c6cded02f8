"""An encoding whose rows stand side by side in tiles of 16: how a CPU holds it, in memory alone and never in a file.

Only the order of the numbers differs, so decoding gives the same matrix. A few rows in a compiled step are multiplied by the
encoding's loop over tiles; everything else, as a prompt, by rows that are taken out of the tiles some at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from llama_fast.contracts import Cut, Encoding, PartLayout, Parts
from llama_fast.model.matrices import Stored
from llama_fast.model.matvec import FEW, product_by_slices
from llama_fast.model.tiles import LANES, rows_of_tiles, tiled, untiled
from llama_ref.checkpoint import TensorSource

SLICE_NUMBERS = 1 << 20
"""Numbers that are taken out of tiles at once: what is made of them on the way stays in a core's cache."""


class Tileable(Encoding, Protocol):
    """An encoding that has a loop over tiles."""

    def sums_over_tiles(self, x_RK: Tensor, parts: Parts) -> Tensor:
        """x @ matrix.T, float32 [R, out], of parts in tiles whose "weight" is words of 32 bits; for a compiler to read."""


@dataclass(frozen=True)
class Tiled:
    """`encoding` in tiles, of a matrix of `outputs` rows whose weight had the type `kind`."""

    encoding: Tileable
    outputs: int
    kind: torch.dtype
    loader: str = ""

    @property
    def name(self) -> str:
        return self.encoding.name

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        return self.encoding.layout(shape)

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return in_tiles(self.encoding.encode(weight, dtype))

    def decode(self, parts: Parts) -> Tensor:
        return self.encoding.decode(self.rows_of(parts, slice(0, self.outputs)))

    def cut(self, parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
        raise ValueError(f"{self.name} in tiles is not cut: a matrix is cut as it is stored, and then laid in tiles")

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        x_RK = x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling() and x_RK.shape[0] <= FEW:
            y_RN = self.encoding.sums_over_tiles(x_RK.float(), parts)[:, : self.outputs]
            return y_RN.to(x.dtype).view(*x.shape[:-1], self.outputs)

        def decoded(rows: slice) -> Tensor:
            return self.encoding.decode(self.rows_of(parts, rows))

        return product_by_slices(x, self.outputs, decoded, LANES, SLICE_NUMBERS)

    def rows(self, ids: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        flat = ids.reshape(-1)
        taken = self.as_stored({name: rows_of_tiles(part, flat) for name, part in parts.items()})
        return self.encoding.rows(torch.arange(len(flat), device=ids.device), taken, dtype).view(*ids.shape, -1)

    def rows_of(self, parts: Parts, rows: slice) -> dict[str, Tensor]:
        """The parts of some rows as they are stored; `rows` begins with a tile."""
        whole = slice(rows.start, -(-rows.stop // LANES) * LANES)
        return self.as_stored({name: untiled(part[whole])[: rows.stop - rows.start] for name, part in parts.items()})

    def as_stored(self, parts: Parts) -> dict[str, Tensor]:
        return {**parts, "weight": parts["weight"].view(self.kind)}


def in_tiles(parts: Parts) -> dict[str, Tensor]:
    return {name: tiled(part.view(torch.int32) if name == "weight" else part) for name, part in parts.items()}


def laid_in_tiles(stored: Stored) -> Stored:
    """The same matrix in tiles, if its encoding has a loop over them and its rows are whole words; else as it is."""
    weight = stored.parts["weight"]
    if not has_loop(stored.encoding) or weight.shape[-1] * weight.itemsize % 4:
        return stored
    encoding = Tiled(stored.encoding, stored.shape[0], weight.dtype)
    return Stored(encoding, stored.shape, in_tiles(stored.parts), stored.bias)


def has_loop(encoding: Encoding) -> TypeGuard[Tileable]:
    return hasattr(encoding, "sums_over_tiles")

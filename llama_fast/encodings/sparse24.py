"""2:4 sparse weights: of each four columns of a row two are stored, and where they stand; the other two are zero.

    >>> parts = Sparse24().encode(torch.tensor([[1.0, -4.0, 0.5, 2.0] * 8]), torch.float32)
    >>> parts["weight"][:, :4], hex(int(parts["places"][0, 0]) & 15)
    (tensor([[-4.,  2., -4.,  2.]]), '0x4')

The two are those of the largest magnitude, so a matrix that was pruned beforehand is stored as it is. Nibble g of word w says
which two of columns 32 w + 4 g to 32 w + 4 g + 3 these are, by its number in `PAIRS`. bf16 values and places
are 9/16 of bf16's bytes, int8 values with a scale per row 5/16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llama_fast.contracts import PartLayout, Parts
from llama_fast.encodings.decoding import Decoding
from llama_fast.encodings.grid import Shared
from llama_fast.encodings.scales import ceil_bf16
from llama_fast.model.matvec import product, product_by_slices

WORD_COLUMNS = 32
"""Columns whose places share a word of 32 bits."""
LARGEST_INT8 = 127
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


@dataclass(frozen=True)
class Sparse24(Decoding):
    """`int8`: the values are 8-bit integers with one scale per output row; else they have the type of the arithmetic."""

    int8: bool = False
    loader: ClassVar[str] = "sparse24"

    @property
    def name(self) -> str:
        return "sparse24-int8" if self.int8 else "sparse24"

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        """ValueError where the columns are no whole words of places."""
        out, columns = shape
        if columns % WORD_COLUMNS:
            raise ValueError(f"{self.name} stores {WORD_COLUMNS} columns together, which {columns} columns are not")
        scale: dict[str, PartLayout] = {"scale": ((out, 1), None)} if self.int8 else {}
        kind = torch.int8 if self.int8 else None
        places = ((out, columns // WORD_COLUMNS), torch.int32)
        return {"weight": ((out, columns // 2), kind), "places": places, **scale}

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """{"weight": [out, in / 2], "places": int32 [out, in / 32]} and "scale" bf16 [out, 1]."""
        self.layout(weight.shape)
        kept, places = two_of_four(weight.float())
        if not self.int8:
            return {"weight": kept.to(dtype), "places": places}
        scale = scales(kept)
        return {"weight": (kept / scale.float()).round().to(torch.int8), "places": places, "scale": scale}

    def grid(self, weight: Tensor, cost: Tensor, dtype: torch.dtype) -> Sparse24Grid:
        self.layout(weight.shape)
        if not self.int8:
            return Sparse24Grid(dtype)
        return Sparse24Grid(dtype, scales(weight * dearest_two(weight, cost)))

    def decode(self, parts: Parts) -> Tensor:
        """Float32 [out, in] of integers with scales, else the type of the values: nothing is rounded."""
        values = parts["weight"].float() * parts["scale"].float() if "scale" in parts else parts["weight"]
        return spread(values, parts["places"])

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        """The dense matrix's, some rows of it at a time; the scale is applied once per output."""
        if torch.compiler.is_compiling():
            return product(x, spread(parts["weight"], parts["places"]), parts.get("scale"))
        scale = parts.get("scale")

        def decoded(rows: slice) -> Tensor:
            return spread(parts["weight"][rows], parts["places"][rows]).float()

        y = product_by_slices(x, parts["weight"].shape[0], decoded)
        return y if scale is None else (y.float() * scale.float().view(-1)).to(y.dtype)


@dataclass(frozen=True)
class Sparse24Grid:
    """A matrix on its way to 2:4. What four columns share is which two are kept: those whose loss would cost most.

    `scale` [out, 1]: the values are multiples of it up to 127; None: numbers of type `dtype`.
    """

    dtype: torch.dtype
    scale: Tensor | None = None
    columns: ClassVar[int] = 4

    def share(self, weight: Tensor, cost: Tensor) -> Shared:
        return (dearest_two(weight, cost),)

    def nearest(self, weight: Tensor, shared: Shared) -> Tensor:
        (kept,) = shared
        if self.scale is None:
            return weight.to(self.dtype).float() * kept
        scale = self.scale.float()
        return (weight / scale).round().clamp(-LARGEST_INT8, LARGEST_INT8) * scale * kept

    def parts(self, weight: Tensor, shared: Sequence[Shared]) -> dict[str, Tensor]:
        values, places = two_of_four(weight)
        if self.scale is None:
            return {"weight": values.to(self.dtype), "places": places}
        return {
            "weight": (values / self.scale.float()).round().to(torch.int8),
            "places": places,
            "scale": self.scale,
        }


def scales(kept: Tensor) -> Tensor:
    """Scales bf16 [out, 1] by which no value [out, columns] leaves [-127, 127]."""
    step = kept.abs().amax(1, keepdim=True) / LARGEST_INT8
    return ceil_bf16(step.clamp(min=torch.finfo(torch.bfloat16).tiny))


def dearest_two(weight: Tensor, cost: Tensor) -> Tensor:
    """Of each four columns the two with the largest cost of being zero, weight^2 * cost: bool [out, columns]."""
    loss_OG4 = (weight.square() * cost).unflatten(1, (-1, 4))
    kept_OG2 = loss_OG4.topk(2, -1, sorted=True).indices
    return torch.zeros_like(loss_OG4, dtype=torch.bool).scatter(-1, kept_OG2, True).flatten(1)


def two_of_four(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest magnitudes of each four columns, [out, in / 2] in the columns' order, and the words of their places."""
    four_OG4 = wide.unflatten(1, (-1, 4))
    place_OG2 = four_OG4.abs().topk(2, -1, sorted=True).indices.sort(-1).values
    first_OG, second_OG = place_OG2.unbind(-1)
    nibble_OW8 = (second_OG - 1 + first_OG * (5 - first_OG) // 2).unflatten(1, (-1, 8))
    word_OW = (nibble_OW8 << (4 * torch.arange(8, device=wide.device))).sum(-1)  # int64: 32 bits without a sign
    signed_OW = torch.where(word_OW >= 2**31, word_OW - 2**32, word_OW).to(torch.int32)
    return four_OG4.gather(-1, place_OG2).flatten(1), signed_OW


def spread(values: Tensor, places: Tensor) -> Tensor:
    """The values at their places among zeros, [out, in] in the values' type."""
    shift_8 = 4 * torch.arange(8, device=places.device, dtype=torch.int32)
    nibble_OG = (places[..., None] >> shift_8).flatten(1)
    id_OG = nibble_OG & 7
    lower_OG = (id_OG >= 3).long() + (id_OG >= 5).long()
    upper_OG = torch.where(id_OG == 0, 1, torch.where(id_OG & 5 == 1, 2, 3))
    place_OG2 = torch.stack([lower_OG, upper_OG], -1)
    zeros = values.new_zeros(values.shape[0], values.shape[1] // 2, 4)
    return zeros.scatter(-1, place_OG2, values.unflatten(1, (-1, 2))).flatten(1)


ENCODINGS = (Sparse24(), Sparse24(True))

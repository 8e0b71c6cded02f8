"""Int4 weights in groups of columns that share a scale, and where asked a zero point: an eighth of float32's bytes, and a little.

    >>> parts = Int4(32).encode(torch.arange(-32.0, 32.0).view(2, 32), torch.float32)
    >>> parts["weight"].shape, parts["scale"].shape
    (torch.Size([2, 4]), torch.Size([2, 1]))

A weight is (nibble - zero) * scale, with a nibble of 0 to 15 and a zero of 8 where no other is stored. Eight neighbouring
columns share a word of 32 bits: byte b of word j holds column 8 j + b below and column 8 j + 4 + b above. So the four bytes
that `word & 0x0f0f0f0f` leaves are four neighbours, as are the four behind a shift.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llama_fast.contracts import Cut, PartLayout, Parts
from llama_fast.encodings.cutting import check_groups, cut_along_axes
from llama_fast.encodings.grid import SMALLER, Shared, least_error
from llama_fast.encodings.scales import ceil_bf16
from llama_fast.model.matvec import product_by_slices
from llama_fast.model.tiles import sums_of_nibbles
from llama_ref.checkpoint import TensorSource
from llama_ref.formats.packed_bits import NIBBLES
from llama_ref.formats.packed_bits import packed_nibbles as packed
from llama_ref.formats.packed_bits import unpacked_nibbles as unpacked

MIDDLE, LARGEST = 8, 15
NAME = re.compile(r"int4(-g(?P<group>[1-9]\d{0,5}))?(?P<zero>-zero)?")


@dataclass(frozen=True)
class Int4:
    """Groups of `group` columns; `zero_point`: each group has the zero that fits its range, else the middle."""

    group: int = 128
    zero_point: bool = False
    loader: ClassVar[str] = "int4"

    def __post_init__(self) -> None:
        if self.group % 32 or self.group < 32:
            raise ValueError(f"group={self.group}: a group is a multiple of 32 columns")

    @property
    def name(self) -> str:
        return "int4" + (f"-g{self.group}" if self.group != 128 else "") + ("-zero" if self.zero_point else "")

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        """ValueError where the columns are no whole groups."""
        out, columns = shape
        if columns % self.group:
            smaller = next((f": take {Int4(g).name}" for g in (64, 32) if columns % g == 0 and g < self.group), "")
            raise ValueError(
                f"{self.name} has groups of {self.group} columns, which {columns} columns are not{smaller}"
            )
        groups = columns // self.group
        zero: dict[str, PartLayout] = {"zero": ((out, groups), torch.uint8)} if self.zero_point else {}
        return {"weight": ((out, columns // NIBBLES), torch.int32), "scale": ((out, groups), None), **zero}

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """To the nearest: {"weight": int32 [out, in / 8], "scale": bf16 [out, groups]} and "zero" uint8 [out, groups]."""
        self.layout(weight.shape)
        wide = weight.float().unflatten(1, (-1, self.group))
        scale, zero = self.scales(wide)
        nibbles = (wide / scale.float()[..., None]).round() + (MIDDLE if zero is None else zero.float()[..., None])
        return self.stored(nibbles.clamp(0, LARGEST).to(torch.uint8).flatten(1), scale, zero)

    def scales(self, wide_ORG: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales bf16 [out, groups] by which no weight of a group is more than half a step off, and zeros."""
        smallest = torch.finfo(torch.bfloat16).tiny
        if not self.zero_point:
            return ceil_bf16((wide_ORG.abs().amax(-1) / (LARGEST - MIDDLE)).clamp(min=smallest)), None
        least, most = wide_ORG.amin(-1).clamp(max=0), wide_ORG.amax(-1).clamp(min=0)
        scale = ceil_bf16(((most - least) / LARGEST).clamp(min=smallest))
        return scale, (-least / scale.float()).round().clamp(0, LARGEST).to(torch.uint8)

    def stored(self, nibbles: Tensor, scale: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
        """Parts of nibbles uint8 [out, in], scales and zeros [out, groups]: how a file's own integers come in, unchanged."""
        return {"weight": packed(nibbles), "scale": scale} | ({} if zero is None else {"zero": zero})

    def grid(self, weight: Tensor, cost: Tensor, dtype: torch.dtype) -> Int4Grid:
        self.layout(weight.shape)
        return Int4Grid(self)

    def decode(self, parts: Parts) -> Tensor:
        """Float32 [out, in]: an integer of five bits times a bf16 scale, so nothing is rounded."""
        grouped = unpacked(parts["weight"]).unflatten(1, (-1, self.group)).float()
        zero = parts["zero"].float()[..., None] if "zero" in parts else MIDDLE
        weight: Tensor = grouped.sub_(zero).mul_(parts["scale"].float()[..., None])
        return weight.flatten(1)

    def cut(self, parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
        """ValueError for a cut through a group, also through the only one: its words hold columns of both sides."""
        check_groups(cut, shape, self.group)
        return cut_along_axes(parts, shape, cut)

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        """The decoded matrix's, some rows of it at a time."""
        return product_by_slices(x, parts["weight"].shape[0], lambda rows: self.decode(rows_of(parts, rows)))

    def sums_over_tiles(self, x_RK: Tensor, parts: Parts) -> Tensor:
        return sums_of_nibbles(x_RK, parts["weight"], parts["scale"], parts.get("zero"), self.group)

    def rows(self, ids: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        flat = {name: part[ids.reshape(-1)] for name, part in parts.items()}
        return self.decode(flat).view(*ids.shape, -1).to(dtype)


@dataclass(frozen=True)
class Int4Grid:
    """A matrix on its way to int4: a group's scale is searched among those of a smaller range.

    Without a zero point the 16 numbers reach one step further below zero than above, so a scale may also be negative.
    """

    encoding: Int4
    shares_of_range: tuple[float, ...] = SMALLER

    @property
    def columns(self) -> int:
        return self.encoding.group

    def share(self, weight: Tensor, cost: Tensor) -> Shared:
        return least_error(weight, cost, self._candidates(weight), self.nearest)

    def _candidates(self, weight_OG: Tensor) -> Iterator[Shared]:
        for share in self.shares_of_range:
            scale, zero = self.encoding.scales(weight_OG[:, None] * share)
            yield (scale,) if zero is None else (scale, zero)
            if zero is None and share < 1:  # with its whole range a group gains nothing by another sign
                yield (-scale,)

    def nearest(self, weight: Tensor, shared: Shared) -> Tensor:
        scale, zero = shared[0].float(), shared[1].float() if len(shared) > 1 else MIDDLE
        nibbles = ((weight / scale).round() + zero).clamp(0, LARGEST)
        return (nibbles - zero) * scale

    def parts(self, weight: Tensor, shared: Sequence[Shared]) -> dict[str, Tensor]:
        scale, *rest = (torch.cat(parts, 1) for parts in zip(*shared, strict=True))
        zero = rest[0] if rest else None
        steps = (weight.unflatten(1, (-1, self.columns)) / scale.float()[..., None]).round()
        nibbles = steps + (MIDDLE if zero is None else zero.float()[..., None])
        return self.encoding.stored(nibbles.to(torch.uint8).flatten(1), scale, zero)


def rows_of(parts: Parts, rows: slice) -> dict[str, Tensor]:
    """The same parts of some rows of the matrix."""
    return {name: part[rows] for name, part in parts.items()}


def of_name(name: str) -> Int4 | None:
    """ "int4-g64-zero" -> Int4(64, True); None for other names."""
    found = NAME.fullmatch(name)
    return Int4(int(found["group"] or 128), bool(found["zero"])) if found else None


ENCODINGS = (Int4(), Int4(64), Int4(32), Int4(128, True), Int4(64, True), Int4(32, True))

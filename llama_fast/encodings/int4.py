"""Int4 weights in groups of columns that share a scale, and where asked a zero point: an eighth of float32's bytes, and a little.

    >>> parts = Int4(32).encode(torch.arange(-32.0, 32.0).view(2, 32), torch.float32)
    >>> parts["weight"].shape, parts["scale"].shape
    (torch.Size([2, 4]), torch.Size([2, 1]))

A weight is (nibble - zero) * scale, with a nibble of 0 to 15 and a zero of 8 where no other is stored. Eight neighbouring
columns share a word of 32 bits: byte b of word j holds column 8 j + b below and column 8 j + 4 + b above. So the four bytes
that `word & 0x0f0f0f0f` leaves are four neighbours, as are the four behind a shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_fast.contracts import Cut, Parts
from llama_fast.encodings.cutting import check_groups
from llama_fast.encodings.grid import SMALLER, Shared, least_error
from llama_fast.encodings.whole_numbers import WholeNumbers
from llama_fast.model.tiles import sums_of_nibbles
from llama_ref.checkpoint import TensorSource
from llama_ref.formats.packed_bits import NIBBLES
from llama_ref.formats.packed_bits import packed_nibbles as packed
from llama_ref.formats.packed_bits import unpacked_nibbles as unpacked


@dataclass(frozen=True)
class Int4(WholeNumbers):
    """Groups of `group` columns; `zero_point`: each group has the zero that fits its range, else the middle."""

    kind, usual_group, loader = "int4", 128, "int4"
    least, middle, largest = 0, 8, 15
    byte, part = torch.uint8, (NIBBLES, torch.int32)

    def __post_init__(self) -> None:
        if self.group % 32 or self.group < 32:
            raise ValueError(f"group={self.group}: a group is a multiple of 32 columns")

    def instead(self, columns: int) -> str:
        return next((f": take {Int4(g).name}" for g in (64, 32) if columns % g == 0 and g < self.group), "")

    def packed(self, numbers: Tensor) -> Tensor:
        return packed(numbers)

    def unpacked(self, weight: Tensor) -> Tensor:
        return unpacked(weight)

    def grid(self, weight: Tensor, cost: Tensor, dtype: torch.dtype) -> Int4Grid:
        self.layout(weight.shape)
        return Int4Grid(self)

    def cut(self, parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
        """ValueError for a cut through a group, also through the only one: its words hold columns of both sides."""
        check_groups(cut, shape, self.group)
        return super().cut(parts, shape, cut)

    def sums_over_tiles(self, x_RK: Tensor, parts: Parts) -> Tensor:
        return sums_of_nibbles(x_RK, parts["weight"], parts["scale"], parts.get("zero"), self.group)


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
        scale, zero = shared[0].float(), shared[1].float() if len(shared) > 1 else self.encoding.middle
        nibbles = ((weight / scale).round() + zero).clamp(0, self.encoding.largest)
        return (nibbles - zero) * scale

    def parts(self, weight: Tensor, shared: Sequence[Shared]) -> dict[str, Tensor]:
        scale, *rest = (torch.cat(parts, 1) for parts in zip(*shared, strict=True))
        zero = rest[0] if rest else None
        steps = (weight.unflatten(1, (-1, self.columns)) / scale.float()[..., None]).round()
        nibbles = steps + self.encoding.shift(zero)
        return self.encoding.stored(nibbles.to(torch.uint8).flatten(1), scale, zero)


of_name = Int4.of_name
ENCODINGS = (Int4(), Int4(64), Int4(32), Int4(128, True), Int4(64, True), Int4(32, True))

"""Whole numbers in groups of columns that share a scale, and where asked a zero point: what int4 and int8 in groups share.

A weight is (number - zero) * scale, with the encoding's middle as zero where no other is stored.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llama_fast.contracts import Encoding, PartLayout, Parts
from llama_fast.encodings.decoding import Decoding
from llama_fast.encodings.scales import ceil_bf16


@dataclass(frozen=True)
class WholeNumbers(Decoding):
    """Groups of `group` columns, 0: a row is one; `zero_point`: each group has the zero that fits its range."""

    group: int = 128
    zero_point: bool = False
    kind: ClassVar[str]
    """The name's first word, as "int4"."""
    usual_group: ClassVar[int]
    """The group that a name without one means."""
    loader: ClassVar[str] = ""
    least: ClassVar[int]
    middle: ClassVar[int]
    largest: ClassVar[int]
    byte: ClassVar[torch.dtype]
    """The type of a number, and of a zero."""
    part: ClassVar[tuple[int, torch.dtype]]
    """How many numbers stand together in the part "weight", and in which type."""

    @property
    def name(self) -> str:
        group = "" if self.group == self.usual_group else f"-g{self.group}"
        return self.kind + group + ("-zero" if self.zero_point else "")

    @classmethod
    def of_name(cls, name: str) -> Encoding | None:
        """Of Int4 "int4-g64-zero" -> Int4(64, True); None for other names."""
        found = re.fullmatch(cls.kind + r"(-g(?P<group>[1-9]\d{0,5}))?(?P<zero>-zero)?", name)
        return cls(int(found["group"] or cls.usual_group), bool(found["zero"])) if found else None

    @abstractmethod
    def instead(self, columns: int) -> str:
        """What to take for columns that are no whole groups, as ": take int8"; or nothing."""

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        """ValueError where the columns are no whole groups."""
        out, columns = shape
        grouped = out, groups_of(self.name, self.group, columns, self.instead(columns))
        zero: dict[str, PartLayout] = {"zero": (grouped, self.byte)} if self.zero_point else {}
        together, kind = self.part
        return {"weight": ((out, columns // together), kind), "scale": (grouped, None), **zero}

    def packed(self, numbers: Tensor) -> Tensor:
        """The part "weight" of numbers [out, in]; here, they themselves."""
        return numbers

    def unpacked(self, weight: Tensor) -> Tensor:
        """The numbers [out, in] again."""
        return weight

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """To the nearest: {"weight", "scale": bf16 [out, groups]}, and "zero" [out, groups]."""
        groups = self.layout(weight.shape)["scale"][0][1]
        wide_OGC = weight.float().unflatten(1, (groups, -1))
        scale, zero = self.scales(wide_OGC)
        numbers_OGC = (wide_OGC / scale.float()[..., None]).round() + self.shift(zero)
        return self.stored(numbers_OGC.clamp(self.least, self.largest).to(self.byte).flatten(1), scale, zero)

    def scales(self, wide_OGC: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales bf16 [out, groups] by which no weight of a group is more than half a step off, and zeros."""
        smallest = torch.finfo(torch.bfloat16).tiny
        if not self.zero_point:
            return ceil_bf16((wide_OGC.abs().amax(-1) / (self.largest - self.middle)).clamp(min=smallest)), None
        least, most = wide_OGC.amin(-1).clamp(max=0), wide_OGC.amax(-1).clamp(min=0)
        scale = ceil_bf16(((most - least) / (self.largest - self.least)).clamp(min=smallest))
        return scale, (self.least - least / scale.float()).round().clamp(self.least, self.largest).to(self.byte)

    def shift(self, zero: Tensor | None) -> Tensor | int:
        """What stands for 0, in front of each group's columns."""
        return self.middle if zero is None else zero.float()[..., None]

    def stored(self, numbers: Tensor, scale: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
        """Parts of numbers [out, in], scales and zeros [out, groups]: how a file's own integers come in, unchanged."""
        return {"weight": self.packed(numbers), "scale": scale} | ({} if zero is None else {"zero": zero})

    def decode(self, parts: Parts) -> Tensor:
        """Float32 [out, in]: an integer of nine bits times a scale, which is not rounded if the scale has 15 bits or fewer."""
        numbers_OGC = self.unpacked(parts["weight"]).float().unflatten(1, (parts["scale"].shape[1], -1))
        if self.middle or "zero" in parts:
            numbers_OGC = numbers_OGC.sub_(self.shift(parts.get("zero")))
        weight: Tensor = numbers_OGC.mul_(parts["scale"].float()[..., None])
        return weight.flatten(1)


def groups_of(name: str, group: int, columns: int, instead: str = "") -> int:
    """How many groups, or the one that a whole row is for 0; ValueError, with the numbers, where the last would not be full."""
    if group and columns % group:
        raise ValueError(f"{name} has groups of {group} columns, which {columns} columns are not{instead}")
    return columns // group if group else 1

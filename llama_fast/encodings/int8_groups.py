"""Int8 weights with zero points, or with a scale for each group of columns of a row: what int8 has not, and other tools write.

    >>> parts = Int8Groups(2).encode(torch.tensor([[1.0, -0.5, 0.0, 100.0]]), torch.float32)
    >>> parts["weight"].shape, parts["scale"].shape
    (torch.Size([1, 4]), torch.Size([1, 2]))

A weight is (number - zero) * scale, both of eight bits, and a zero of 0 where no other is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llama_fast.contracts import Cut, PartLayout, Parts
from llama_fast.encodings.cutting import cut_along_axes
from llama_fast.encodings.scales import ceil_bf16
from llama_fast.model.matvec import product_by_slices
from llama_ref.checkpoint import TensorSource

LEAST, LARGEST = -128, 127
NAME = re.compile(r"int8(-g(?P<group>[1-9]\d{0,5}))?(?P<zero>-zero)?")


@dataclass(frozen=True)
class Int8Groups:
    """Groups of `group` columns, 0: a row is one; `zero_point`: each group has the zero that fits its range."""

    group: int = 128
    zero_point: bool = False
    loader: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.group < 0 or not (self.group or self.zero_point):
            raise ValueError(f"group={self.group}: columns that share a scale, or 0 for rows with zero points")

    @property
    def name(self) -> str:
        return "int8" + (f"-g{self.group}" if self.group else "") + ("-zero" if self.zero_point else "")

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        """ValueError where the columns are no whole groups."""
        out, columns = shape
        if self.group and columns % self.group:
            raise ValueError(
                f"{self.name} has groups of {self.group} columns, which {columns} columns are not: take int8"
            )
        groups = columns // self.group if self.group else 1
        zero: dict[str, PartLayout] = {"zero": ((out, groups), torch.int8)} if self.zero_point else {}
        return {"weight": ((out, columns), torch.int8), "scale": ((out, groups), None), **zero}

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """To the nearest: {"weight": int8 [out, in], "scale": bf16 [out, groups]} and "zero" int8 [out, groups]."""
        groups = self.layout(weight.shape)["scale"][0][1]
        wide_OGC = weight.float().unflatten(1, (groups, -1))
        smallest = torch.finfo(torch.bfloat16).tiny
        if not self.zero_point:
            scale = ceil_bf16((wide_OGC.abs().amax(-1) / LARGEST).clamp(min=smallest))
            return {"weight": (wide_OGC / scale.float()[..., None]).round().flatten(1).to(torch.int8), "scale": scale}
        least, most = wide_OGC.amin(-1).clamp(max=0), wide_OGC.amax(-1).clamp(min=0)
        scale = ceil_bf16(((most - least) / (LARGEST - LEAST)).clamp(min=smallest))
        zero = (LEAST - least / scale.float()).round().clamp(LEAST, LARGEST)
        whole_OGC = ((wide_OGC / scale.float()[..., None]).round() + zero[..., None]).clamp(LEAST, LARGEST)
        return {"weight": whole_OGC.flatten(1).to(torch.int8), "scale": scale, "zero": zero.to(torch.int8)}

    def decode(self, parts: Parts) -> Tensor:
        """Float32 [out, in]: an integer of nine bits times a scale, which is not rounded if the scale has 15 bits or fewer."""
        whole_OGC = parts["weight"].float().unflatten(1, (parts["scale"].shape[1], -1))
        if "zero" in parts:
            whole_OGC = whole_OGC - parts["zero"].float()[..., None]
        weight: Tensor = (whole_OGC * parts["scale"].float()[..., None]).flatten(1)
        return weight

    def cut(self, parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
        return cut_along_axes(parts, shape, cut)

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        """The decoded matrix's, some rows of it at a time."""
        return product_by_slices(
            x, parts["weight"].shape[0], lambda rows: self.decode({name: part[rows] for name, part in parts.items()})
        )

    def rows(self, ids: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        flat = {name: part[ids.reshape(-1)] for name, part in parts.items()}
        return self.decode(flat).view(*ids.shape, -1).to(dtype)


def of_name(name: str) -> Int8Groups | None:
    """ "int8-g64-zero" -> Int8Groups(64, True); None for other names, as "int8"."""
    found = NAME.fullmatch(name)
    if found is None or name == "int8":
        return None
    return Int8Groups(int(found["group"] or 0), bool(found["zero"]))

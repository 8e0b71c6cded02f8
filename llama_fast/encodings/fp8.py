"""Fp8 weights (e4m3): one scale per output row, or one for each group of columns of a row.

    >>> parts = Fp8().encode(torch.tensor([[448.0, -1.0], [0.5, 0.0]]), torch.float32)
    >>> parts["weight"].float()
    tensor([[448.,  -1.],
            [448.,   0.]])

The steps grow with the number: three bits behind the leading one, so a weight is at most 1/16 of itself off, and half of
2^-9 of a scale near zero. A scale is the largest weight over 448, the largest e4m3 number, rounded up to a bf16 number, so
that no weight overflows. Activations stay floating. A published checkpoint's blocks of 128 x 128 are groups of 128 columns,
the scale of a block repeated for each of its rows: so every part's first axis is `out`, as for all encodings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_fast.contracts import PartLayout, Parts
from llama_fast.encodings.decoding import Decoding
from llama_fast.encodings.grid import SMALLER, Shared, least_error
from llama_fast.encodings.scales import ceil_bf16
from llama_fast.encodings.whole_numbers import groups_of
from llama_fast.model.matvec import product

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
NAME = re.compile(r"fp8(-g(?P<group>[1-9]\d{0,5}))?")


@dataclass(frozen=True)
class Fp8(Decoding):
    """Half of bf16's bytes. `group`: columns that share a scale; 0: a row has one."""

    group: int = 0

    def __post_init__(self) -> None:
        if self.group < 0:
            raise ValueError(f"group={self.group}: columns that share a scale, or 0 for whole rows")

    @property
    def name(self) -> str:
        return f"fp8-g{self.group}" if self.group else "fp8"

    @property
    def loader(self) -> str:
        if not self.group:
            return "rows"
        return "" if self.group % 32 else "fp8_groups"

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        """ValueError where the columns are no whole groups."""
        out, columns = shape
        return {
            "weight": ((out, columns), E4M3),
            "scale": ((out, groups_of(self.name, self.group, columns, ": take fp8")), None),
        }

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """{"weight": e4m3 [out, in], "scale": bf16 [out, 1]}, or [out, groups]."""
        self.layout(weight.shape)
        grouped = weight.float().unflatten(1, (-1, self.group or weight.shape[1]))
        scale = scales(grouped)
        return {"weight": (grouped / scale.float()[..., None]).flatten(1).to(E4M3), "scale": scale}

    def grid(self, weight: Tensor, cost: Tensor, dtype: torch.dtype) -> Fp8Grid:
        self.layout(weight.shape)
        return Fp8Grid(self.group or weight.shape[1])

    def decode(self, parts: Parts) -> Tensor:
        """Float32 [out, in]: four bits times a scale, which is not rounded if the scale has 20 bits or fewer."""
        grouped = parts["weight"].float().unflatten(1, (parts["scale"].shape[1], -1))
        weight: Tensor = grouped * parts["scale"].float()[..., None]
        return weight.flatten(1)

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        """The scale is applied once per output; of groups, the decoded matrix's, some rows of it at a time."""
        return super().product(x, parts) if self.group else product(x, parts["weight"], parts["scale"])

    def rows(self, ids: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        flat = ids.reshape(-1)
        numbers = parts["weight"].view(torch.uint8)[flat].view(E4M3)  # of e4m3 itself no rows are gathered
        return self.decode({"weight": numbers, "scale": parts["scale"][flat]}).to(dtype).view(*ids.shape, -1)


def of_name(name: str) -> Fp8 | None:
    """ "fp8-g64" -> Fp8(64); None for other names."""
    found = NAME.fullmatch(name)
    return Fp8(int(found["group"] or 0)) if found else None


def scales(grouped: Tensor) -> Tensor:
    """Scales bf16 [...] by which no weight [..., columns] overflows."""
    return ceil_bf16((grouped.abs().amax(-1) / LARGEST).clamp(min=torch.finfo(torch.bfloat16).tiny))


@dataclass(frozen=True)
class Fp8Grid:
    """A matrix on its way to fp8. Halving a scale changes nothing but what overflows, so the search ends before that."""

    columns: int
    shares_of_range: tuple[float, ...] = SMALLER

    def share(self, weight: Tensor, cost: Tensor) -> Shared:
        several = ((scales(weight[:, None] * share),) for share in self.shares_of_range)
        return least_error(weight, cost, several, self.nearest)

    def nearest(self, weight: Tensor, shared: Shared) -> Tensor:
        scale = shared[0].float()
        return (weight / scale).clamp(-LARGEST, LARGEST).to(E4M3).float() * scale

    def parts(self, weight: Tensor, shared: Sequence[Shared]) -> dict[str, Tensor]:
        scale = torch.cat([scale for (scale,) in shared], 1)
        numbers = weight.unflatten(1, (-1, self.columns)) / scale.float()[..., None]
        return {"weight": numbers.flatten(1).to(E4M3), "scale": scale}


ENCODINGS = (Fp8(), Fp8(128))

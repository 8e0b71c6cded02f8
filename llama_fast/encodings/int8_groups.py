"""Int8 weights with zero points, or with a scale for each group of columns of a row: what int8 has not, and other tools write.

    >>> parts = Int8Groups(2).encode(torch.tensor([[1.0, -0.5, 0.0, 100.0]]), torch.float32)
    >>> parts["weight"].shape, parts["scale"].shape
    (torch.Size([1, 4]), torch.Size([1, 2]))

A weight is (number - zero) * scale, both of eight bits, and a zero of 0 where no other is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama_fast.contracts import Encoding
from llama_fast.encodings.whole_numbers import WholeNumbers


@dataclass(frozen=True)
class Int8Groups(WholeNumbers):
    """Groups of `group` columns, 0: a row is one; `zero_point`: each group has the zero that fits its range."""

    kind, usual_group = "int8", 0
    least, middle, largest = -128, 0, 127
    byte, part = torch.int8, (1, torch.int8)

    def __post_init__(self) -> None:
        if self.group < 0 or not (self.group or self.zero_point):
            raise ValueError(f"group={self.group}: columns that share a scale, or 0 for rows with zero points")

    def instead(self, columns: int) -> str:
        return ": take int8"


def of_name(name: str) -> Encoding | None:
    """ "int8-g64-zero" -> Int8Groups(64, True); None for other names, as "int8"."""
    return None if name == "int8" else Int8Groups.of_name(name)

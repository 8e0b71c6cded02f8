"""What an encoding that can be fitted to a text says of its numbers, and the search for what its groups share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Shared = tuple[Tensor, ...]
"""What neighbouring columns of a matrix have in common: a scale [out, 1], or which of them are kept, [out, columns]."""


class Grid(Protocol):
    """The numbers that one matrix [out, in] can be stored as.

    An encoding that can be fitted to a text has a method `grid(weight [out, in], cost [in], dtype) -> Grid`: cost is what an
    error in a column costs, and dtype the type of what is stored as floats.
    """

    @property
    def columns(self) -> int:
        """How many neighbouring columns have something in common: a group's, or all of a row's."""

    def share(self, weight: Tensor, cost: Tensor) -> Shared:
        """What so many columns [out, columns] shall have in common, so that their squared errors cost little."""

    def nearest(self, weight: Tensor, shared: Shared) -> Tensor:
        """The numbers next to these, float32; `shared` has one entry a row, or one for each of these columns."""

    def parts(self, weight: Tensor, shared: Sequence[Shared]) -> dict[str, Tensor]:
        """A matrix [out, in] of such numbers as the encoding stores it."""


SMALLER = (1.0, 0.96, 0.92, 0.875, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6)
"""Shares of its range that a group may be stored with: what lies beyond is cut off, and all the rest gets finer steps."""


def least_error(
    weight: Tensor, cost: Tensor, several: Iterable[Shared], nearest: Callable[[Tensor, Shared], Tensor]
) -> Shared:
    """Of several scales for the columns [out, columns], each row's whose errors cost least: the first of equal ones."""
    best: Shared | None = None
    for shared in several:
        error_O1 = ((nearest(weight, shared) - weight).square() * cost).sum(1, keepdim=True)
        if best is None:
            best, least_O1 = shared, error_O1
        better_O1 = error_O1 < least_O1
        best = tuple(torch.where(better_O1, new, old) for new, old in zip(shared, best, strict=True))
        least_O1 = torch.minimum(error_O1, least_O1)
    assert best is not None
    return best

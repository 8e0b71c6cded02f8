"""Cutting a matrix whose every part has the matrix's own axes, at full length, in groups, or of length 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from llama_fast.contracts import Cut
from llama_ref.checkpoint import TensorSource


def cut_along_axes(parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
    """Every part cut where the matrix is, unless it has length 1 there; contiguous, and no windows that keep the whole alive.

    A scale [out, groups] is cut where the weight is; ValueError where that would part a group.
    """
    return {
        name: held[tuple(rescaled(*axis) for axis in zip(cut, shape, held.shape))].contiguous()
        for name, held in parts.items()
    }


def rescaled(part: slice, size: int, length: int) -> slice:
    """A slice of an axis of `size` as one of `length` entries: (64:128 of 256, 4) -> 1:2; (64:128 of 256, 1) -> all."""
    if length == 1:
        return slice(None)
    start, stop, _ = part.indices(size)
    if start * length % size or stop * length % size:
        raise ValueError(f"columns {start} to {stop} of {size} part one of {length} groups")
    return slice(start * length // size, stop * length // size)


def check_groups(cut: Cut, shape: Sequence[int], group: int) -> None:
    """ValueError, with numbers, where columns are cut elsewhere than between groups of so many."""
    start, stop, _ = cut[1].indices(shape[1])
    if start % group or (stop % group and stop != shape[1]):
        raise ValueError(f"columns {start} to {stop} of {shape[1]} part one of {-(-shape[1] // group)} groups")

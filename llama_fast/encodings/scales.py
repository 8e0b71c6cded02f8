"""Scales: bf16 numbers, so that the same file means the same matrix in every type of arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from llama_fast.contracts import Shared

SMALLER = (1.0, 0.96, 0.92, 0.875, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6)
"""Shares of its range that a group may be stored with: what lies beyond is cut off, and all the rest gets finer steps."""


def ceil_bf16(x: Tensor) -> Tensor:
    """The smallest bf16 number that is not below positive float32 x: 1.001 -> 1.0078125."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).bfloat16()


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

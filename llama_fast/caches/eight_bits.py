"""Keys and values in eight bits, in slots or in pages: half of bf16's bytes, and a little lost.

Each head's key, and value, of a position is 127 integers to either side of zero, times a step of its own. A token sees its own
key as it is stored, like all others: a text's numbers do not depend on how its tokens were grouped into passes.

Shapes: B batch, S slots, K key/value heads, d head width, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LARGEST = 127
LEAST_STEP = 1e-30
"""The step of a vector of zeros, so that nothing is divided by 0."""


def in_steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] as int8 integers [..., d] and float32 steps [..., 1]: x is near integers * step, by half a step at most."""
    wide = x.float()
    step = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=LEAST_STEP)
    return (wide / step).round().to(torch.int8), step


class EightBitLayer:
    """One block's keys and values: a layer of integers, and one of the steps of its vectors."""

    def __init__(self, whole: Any, dtype: torch.dtype, steps: Any = None):
        """`whole`: a layer of int8 tensors; `dtype`: the type of the arithmetic."""
        self.whole, self.dtype = whole, dtype
        self.steps = whole.beside(1, torch.float32) if steps is None else steps

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Integers of keys and of values, then their steps; as the layers keep them."""
        return (*self.whole.tensors, *self.steps.tensors)

    @property
    def k(self) -> Tensor:
        """The keys that attention reads, [B, K, S, d]: a copy of them in the type of the arithmetic."""
        return self._wide(self.whole.k, self.steps.k)

    @property
    def v(self) -> Tensor:
        return self._wide(self.whole.v, self.steps.v)

    def parts(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The same, by a few rows at a time where the slots are in pages."""
        if not hasattr(self.whole, "parts"):
            yield slice(None), self.k, self.v
            return
        for rows, k_BKSd, v_BKSd in self.whole.parts():
            k_step, v_step = (self.steps.gathered(pool, rows) for pool in self.steps.tensors)
            yield rows, self._wide(k_BKSd, k_step), self._wide(v_BKSd, v_step)

    def _wide(self, whole: Tensor, step: Tensor) -> Tensor:
        return (whole * step).to(self.dtype)

    def put(self, k_BTKd: Tensor, v_BTKd: Tensor, position_BT: Tensor) -> None:
        (k, k_step), (v, v_step) = in_steps(k_BTKd), in_steps(v_BTKd)
        self.whole.put(k, v, position_BT)
        self.steps.put(k_step, v_step, position_BT)

    def rows(self, part: slice) -> EightBitLayer:
        return EightBitLayer(self.whole.rows(part), self.dtype, self.steps.rows(part))

    def through(self, table: Any) -> EightBitLayer:
        return EightBitLayer(self.whole.through(table), self.dtype, self.steps.through(table))

    @property
    def table(self) -> Any:
        """Which pages its slots stand in, if they do."""
        return self.whole.table


def known(bits: object) -> None:
    """ValueError for a number of bits that keys and values are not kept in."""
    if bits not in (None, 8) or isinstance(bits, bool):
        raise ValueError(f"bits={bits!r} must be 8, or None for the type of the arithmetic")

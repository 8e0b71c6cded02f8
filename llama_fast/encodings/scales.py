"""Scales: bf16 numbers, so that the same file means the same matrix in every type of arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


def ceil_bf16(x: Tensor) -> Tensor:
    """The smallest bf16 number that is not below positive float32 x: 1.001 -> 1.0078125."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).bfloat16()

"""A few rows times a matrix: what a decode step consists of.

On a CPU a library's matrix product has no good path for a single row, least of all for int8 weights. Written as a sum,
the same product becomes a loop that inductor generates: it streams the weights once, converts them in registers and
runs on all cores. Every row keeps an accumulator of its own, so a row's result has the same bits alone and among others.
Shapes: R rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 8
"""Rows up to which reading the weights, not multiplying, takes the time."""
FEW_OF_BF16 = 4
"""The same for bf16 weights: for these the library's product of many rows costs what five rows of the loop cost."""


def product(x: Tensor, weight_NK: Tensor, scale_N1: Tensor | None = None) -> Tensor:
    """(x @ weight.T) * scale for x [..., K]: [..., N] in x's type. Sums and scale in float32, rounded once."""
    x_RK = x.reshape(-1, x.shape[-1])
    few = FEW_OF_BF16 if weight_NK.dtype is torch.bfloat16 else FEW
    # The device first: where a compiler sees the number of rows compared, it compiles each side of the comparison.
    if x.device.type == "cpu" and x_RK.shape[0] <= few and torch.compiler.is_compiling():
        wide_NK = weight_NK.float()
        y_RN = torch.stack([(row_K.float() * wide_NK).sum(-1) for row_K in x_RK.unbind()])
    else:
        y_RN = F.linear(x_RK, weight_NK.to(x.dtype))
    if scale_N1 is not None:
        y_RN = y_RN.float() * scale_N1.float().view(-1)
    return y_RN.to(x.dtype).view(*x.shape[:-1], -1)

"""One row times a matrix: what a decode step consists of.

On a CPU a library's matrix product has no good path for a single row, least of all for int8 weights. Written as a sum,
the same product becomes a loop that inductor generates: it streams the weights once, converts them in registers and
runs on all cores. Shapes: R rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def product(x: Tensor, weight_NK: Tensor, scale_N1: Tensor | None = None) -> Tensor:
    """(x @ weight.T) * scale for x [..., K]: [..., N] in x's type. Sums and scale in float32, rounded once."""
    if x.numel() == x.shape[-1] and x.device.type == "cpu" and torch.compiler.is_compiling():
        y = (x.float() * weight_NK.float()).sum(-1)
        y = y if scale_N1 is None else y * scale_N1.float().view(-1)
        return y.to(x.dtype).view(*x.shape[:-1], -1)
    y = F.linear(x, weight_NK.to(x.dtype))
    return y if scale_N1 is None else (y.float() * scale_N1.float().view(-1)).to(x.dtype)

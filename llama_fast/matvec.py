"""A few rows times a matrix: what a decode step consists of.

On a CPU a library's matrix product has no good path for a single row, least of all for int8 weights. Written as a sum,
the same product becomes a loop that inductor generates: it streams the weights once, converts them in registers and
runs on all cores. Every row keeps an accumulator of its own, so a row's result has the same bits alone and among others.
Where nothing is compiled a library multiplies; not always the one that PyTorch would choose.
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
FEW_OF_MKL = 4
"""Rows up to which a batch of matrices by MKL is faster than oneDNN's product (tests/speed/products.py)."""
ONEDNN, MKL = torch.backends.mkldnn.is_available(), torch.backends.mkl.is_available()


def product(x: Tensor, weight_NK: Tensor, scale_N1: Tensor | None = None) -> Tensor:
    """(x @ weight.T) * scale for x [..., K]: [..., N] in x's type. Sums and scale in float32, rounded once."""
    if not torch.compiler.is_compiling():
        return scaled(library_product(x, weight_NK.to(x.dtype)), scale_N1)
    x_RK = x.reshape(-1, x.shape[-1])
    few = FEW_OF_BF16 if weight_NK.dtype is torch.bfloat16 else FEW
    # The device first: where a compiler sees the number of rows compared, it compiles each side of the comparison.
    if x.device.type == "cpu" and x_RK.shape[0] <= few:
        wide_NK = weight_NK.float()
        y_RN = torch.stack([(row_K.float() * wide_NK).sum(-1) for row_K in x_RK.unbind()])
    else:
        y_RN = F.linear(x_RK, weight_NK.to(x.dtype))
    return scaled(y_RN, scale_N1).to(x.dtype).view(*x.shape[:-1], -1)


def scaled(y: Tensor, scale_N1: Tensor | None) -> Tensor:
    """Columns times their factors, in float32 and rounded to the type of y."""
    return y if scale_N1 is None else (y.float() * scale_N1.float().view(-1)).to(y.dtype)


def library_product(x: Tensor, weight_NK: Tensor) -> Tensor:
    """x @ weight.T by the library that is fastest at it.

    For float32 on a CPU PyTorch takes MKL. On an AMD CPU its product of a few rows reads weights at under half of the memory's
    speed; as a batch of one matrix for each thread, at nearly all of it. For more rows oneDNN is faster.
    """
    if x.device.type != "cpu" or x.dtype is not torch.float32 or torch.is_grad_enabled():  # oneDNN's has no gradient
        return F.linear(x, weight_NK)
    N, K = weight_NK.shape
    x_RK = x.reshape(-1, K)
    R, threads = x_RK.shape[0], torch.get_num_threads()
    if MKL and R <= FEW_OF_MKL and N and N % threads == 0:
        y_PnR = torch.bmm(weight_NK.unflatten(0, (threads, -1)), x_RK.t().expand(threads, K, R))
        return y_PnR.permute(2, 0, 1).reshape(*x.shape[:-1], N)
    if ONEDNN:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_NK, None, "none", [], "")
        return y
    return F.linear(x, weight_NK)

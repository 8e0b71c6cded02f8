"""A few rows times a matrix: what a decode step consists of.

On a CPU a library's matrix product has no good path for a single row, least of all for int8 weights. Written as a sum,
the same product becomes a loop that inductor generates: it streams the weights once, converts them in registers and
runs on all cores. Every row keeps an accumulator of its own, so a row's result has the same bits alone and among others.
Where nothing is compiled a library multiplies; not always the one that PyTorch would choose.
Shapes: R rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 8
"""Rows up to which reading the weights, not multiplying, takes the time."""
FEW_OF_BF16 = 4
"""The same for bf16 weights: for these the library's product of many rows costs what five rows of the loop cost."""
FEW_OF_MKL = 4
"""Rows up to which a batch of matrices by MKL is faster than oneDNN's product (tests/instruments/products.py)."""
ONEDNN, MKL = torch.backends.mkldnn.is_available(), torch.backends.mkl.is_available()
BY_WORDS = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether inductor's loops read int8 by way of a copy on which the processor stalls: with AVX-512 they do not."""


def product(x: Tensor, weight_NK: Tensor, scale_N1: Tensor | None = None) -> Tensor:
    """(x @ weight.T) * scale for x [..., K]: [..., N] in x's type. All is float32, but a library's sums before the scale."""
    if not torch.compiler.is_compiling():
        if x.device.type == "cpu" and x.dtype is torch.float32 and weight_NK.dtype is not torch.float32:
            return scaled(product_by_slices(x, weight_NK.shape[0], lambda rows: weight_NK[rows].float()), scale_N1)
        return scaled(library_product(x, weight_NK.to(x.dtype)), scale_N1)
    x_RK = x.reshape(-1, x.shape[-1])
    few = FEW_OF_BF16 if weight_NK.dtype is torch.bfloat16 else FEW
    # The device first: where a compiler sees the number of rows compared, it compiles each side of the comparison.
    if x.device.type == "cpu" and x_RK.shape[0] <= few:
        by_words = BY_WORDS and weight_NK.dtype is torch.int8 and weight_NK.shape[1] % 4 == 0
        y_RN = (sums_by_words if by_words else sums)(x_RK.float(), weight_NK)
    else:
        y_RN = F.linear(x_RK, weight_NK.to(x.dtype))
    return scaled(y_RN, scale_N1).to(x.dtype).view(*x.shape[:-1], -1)


SLICE_NUMBERS = 4 << 20
"""Numbers of a matrix that are decoded at once: their memory is used again, and stays in a GPU's cache."""


def product_by_slices(
    x: Tensor, N: int, decoded: Callable[[slice], Tensor], together: int = 1, numbers: int = SLICE_NUMBERS
) -> Tensor:
    """x [..., K] @ weight.T, of a weight [N, K] whose rows `decoded` gives in float32, some at a time: [..., N] in x's type.

    A slice is a multiple of `together` rows, but at the end of the matrix, and has about as many `numbers`.
    The decoded numbers are not rounded: a CPU multiplies in float32, a GPU bf16 activations in fp16 (`fp16_product`).
    """
    x_RK = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        few = x.device.type == "cpu" and x_RK.shape[0] <= FEW
        y_RN = (sums if few else F.linear)(x_RK.float(), decoded(slice(0, N)))
        return y_RN.to(x.dtype).view(*x.shape[:-1], N)
    multiply = fp16_product if x.device.type == "cuda" and x.dtype is not torch.float32 else library_product_float32
    rows = max(1, numbers // x.shape[-1] // together) * together
    # laid out first: small results that live on among the large temporaries would keep an allocator from using these again
    y_RN = x_RK.new_empty(x_RK.shape[0], N, dtype=torch.float32)
    for first in range(0, N, rows):
        some = slice(first, min(first + rows, N))
        y_RN[:, some] = multiply(x_RK, decoded(some))
    return y_RN.to(x.dtype).view(*x.shape[:-1], N)


def product_by_pieces(x: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    """x [..., K] @ weight.T, of a weight that is given in P pieces float32 [N, B, a, w]: [..., N] in x's type.

    The K columns are [B, a, P, w], and piece p holds those at [:, :, p]. For a compiler: a few rows on a CPU become one loop
    over the pieces' own storage.
    """
    N, blocks, a, w = pieces[0].shape
    x_RK = x.reshape(-1, x.shape[-1]).float()
    if x.device.type == "cpu" and x_RK.shape[0] <= FEW:
        # stored before it is read N times, whatever made it
        x_RK = torch.ops.prims.inductor_force_stride_order(x_RK, x_RK.contiguous().stride())
        rows = [row.unflatten(0, (blocks, a, len(pieces), w)).unbind(2) for row in x_RK.unbind()]
        products = [[x_Baw * piece for x_Baw, piece in zip(row, pieces)] for row in rows]
        y_RN = torch.stack([sum(terms[1:], terms[0]).sum((1, 2, 3)) for terms in products])
    else:
        y_RN = F.linear(x_RK, torch.stack([*pieces], 3).flatten(1))
    return y_RN.to(x.dtype).view(*x.shape[:-1], N)


def library_product_float32(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    return library_product(x_RK.float(), weight_NK)


def fp16_product(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """x @ weight.T on tensor cores, float32 [R, N], of numbers that fp16 holds once a row's largest is near 1.

    bf16 activations have 8 bits, and 4 bits times a bf16 scale have 11: fp16 has these. What is under 2^-14 of its row's largest
    loses bits below 2^-25 of that.
    """
    x_R1, weight_N1 = power_of_two(x_RK), power_of_two(weight_NK)
    y_RN = torch.mm((x_RK / x_R1).half(), (weight_NK / weight_N1).half().t(), out_dtype=torch.float32)
    return y_RN * x_R1 * weight_N1.t()


def power_of_two(x_RK: Tensor) -> Tensor:
    """The power of two above each row's largest number, float32 [R, 1]: a division by it is exact."""
    return torch.ldexp(torch.ones_like(x_RK[:, :1], dtype=torch.float32), x_RK.float().abs().amax(1, True).frexp()[1])


def sums(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """x @ weight.T as a loop over each row of weights; of int8 weights over two rows, which are read side by side."""
    streams = 2 if weight_NK.dtype is torch.int8 and weight_NK.shape[0] % 2 == 0 else 1
    wide_SnK = weight_NK.unflatten(0, (streams, -1)).float()
    return torch.stack(
        [torch.cat([(row_K * wide_nK).sum(-1) for wide_nK in wide_SnK]) for row_K in kept(x_RK).unbind()]
    )


def kept(x: Tensor) -> Tensor:
    """x, which a compiled step is to store and not to compute again wherever it is read.

    A word that `torch._inductor.inductor_prims` knows asks for the layout that x has; what has a layout is stored.
    """
    if not torch.compiler.is_compiling():
        return x
    stored: Tensor = torch.ops.prims.inductor_force_stride_order(x, x.contiguous().stride())
    return stored


def sums_by_words(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """The same of int8 weights that are read four to a word: shifts bring each to the top, and down again with its sign.

    Every fourth input then stands beside its like: x [R, 4, K / 4]. That layout is asked for; otherwise inductor would turn the
    weights instead.
    """
    # by way of float32: whole vectors of these are read as they lie, of integers by a copy
    word_NQ = weight_NK.view(torch.float32).view(torch.int32)
    bytes_of_word = [(word_NQ << (24 - 8 * i) >> 24).float() for i in range(4)]
    x_R4Q = kept(x_RK.unflatten(-1, (-1, 4)).transpose(1, 2))
    parts = [[x_Q * byte_NQ for x_Q, byte_NQ in zip(x_4Q.unbind(), bytes_of_word)] for x_4Q in x_R4Q.unbind()]
    return torch.stack([((p[0] + p[1]) + (p[2] + p[3])).sum(-1) for p in parts])


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

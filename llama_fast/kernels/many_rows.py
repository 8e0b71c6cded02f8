"""The products of more rows than our kernels take, by PyTorch's matrix product, and what stands between them, a kernel each.

Weights of another type than the activations' are widened first. No function synchronises with the host.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from llama_fast.kernels.launching import launch
from llama_fast.kernels.ops import Rope, rms_norm
from llama_fast.kernels.prompt import _gate, _rotate_and_store
from llama_fast.kernels.stored import Narrow, group_of
from llama_fast.kernels.tuning import next_power_of_2
from llama_fast.kernels.widen import _add_scaled, _halve, _widen

WIDENED_NUMBERS = 96 << 20
"""Numbers of a weight that are widened at once: 192 MB. Shorter stretches, which a GPU's cache could hold, cost more launches."""


class Wide(NamedTuple):
    """The product of many rows [M, N], of which a column, and a row, has still to be multiplied by its factor [N], [M] if there is
    one."""

    product: Tensor
    columns: Tensor | None = None
    rows: Tensor | None = None

    def value(self, dtype: torch.dtype) -> Tensor:
        """All of it multiplied, [M, N]."""
        result = self.product.float()
        result = result if self.columns is None else result * self.columns.float().view(-1)
        return (result if self.rows is None else result * self.rows[:, None]).to(dtype)


def wide_linear(
    x: Tensor, weight: Tensor | Narrow, scale: Tensor | None, gain: Tensor | None = None, eps: float = 0.0
) -> Wide:
    """x W^T for more rows than `takes` allows, behind an RMS norm if there is a gain, by PyTorch's matrix product.

    Weights of another type than x's are widened first, a large matrix in stretches.
    """
    in_groups = group_of(weight) > 0
    halves = in_groups and x.dtype == torch.bfloat16
    dtype, factors = torch.float16 if halves else x.dtype, None
    if gain is not None:
        x = rms_norm(x, gain, eps, dtype=dtype)
    elif halves:
        x, factors = halve(x)
    if isinstance(weight, Tensor) and weight.dtype == dtype:
        return Wide(torch.nn.functional.linear(x, weight), scale)
    (n, k), m = weight.shape, x.shape[0]
    powers = torch.empty(n if in_groups else 0, dtype=torch.float32, device=x.device)
    product = torch.empty(m, n, dtype=dtype, device=x.device)
    at_once = min(n, max(1, WIDENED_NUMBERS // k))
    scratch = torch.empty(at_once, k, dtype=dtype, device=x.device)
    for first in range(0, n, at_once):
        rows = min(at_once, n - first)
        widen(weight, first, scratch[:rows], powers)
        torch.mm(x, scratch[:rows].t(), out=product[:, first : first + rows])
    return Wide(product, powers if in_groups else scale, factors)


def widen(weight: Tensor | Narrow, first: int, out: Tensor, powers: Tensor) -> None:
    """Rows of a weight from `first` on as dense ones, to out [rows, K]; of groups, the powers of two that they were divided by, to
    their places in powers [N]."""
    rows, k = out.shape
    narrow = Narrow("rows", k, weight) if isinstance(weight, Tensor) else weight
    parts = [out if part is None else part for part in (narrow.places, narrow.scale, narrow.zero)]
    values = narrow.weight.view(torch.int8) if narrow.kind == "sparse_int8" else narrow.weight
    launch(_widen, (rows, triton.cdiv(k, 2048)))(
        values, *parts, out, powers, first, KIND=narrow.kind, ZERO=narrow.zero is not None, K=k, G=narrow.group,
        BG=next_power_of_2(max(1, k // narrow.group)), BK=2048, num_warps=8,
    )  # fmt: skip


def halve(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] as fp16 over each row's power of two, and these powers [M]."""
    m, k = x.shape
    out, powers = torch.empty_like(x, dtype=torch.float16), torch.empty(m, dtype=torch.float32, device=x.device)
    launch(_halve, (m,))(x, out, powers, K=k, BK=next_power_of_2(k), num_warps=16)
    return out, powers


def add_wide(x: Tensor, wide: Wide) -> Tensor:
    """x [M, N] += a product of many rows. Returns x."""
    m, n = x.shape
    launch(_add_scaled, (m, triton.cdiv(n, 1024)))(
        x, wide.product, x if wide.columns is None else wide.columns, x if wide.rows is None else wide.rows,
        N=n, BN=1024, COLUMNS=wide.columns is not None, ROWS=wide.rows is not None,
    )  # fmt: skip
    return x


def rotate_and_store(qkv: Wide, rope: Rope, dtype: torch.dtype) -> Tensor:
    """Of the products [B * T, (H + 2 HKV) * HD] of many rows: rotary, k and v to the caches. -> q [B * T, H * HD] in `dtype`.

    Row m is token m % T of batch row m // T and sits at position start[m // T] + m % T.
    """
    rows, columns = qkv.product.shape
    batch, kv_heads, head_dim = rope.batch, rope.k_cache.shape[1], rope.k_cache.shape[-1]
    out = torch.empty(rows, rope.heads * head_dim, dtype=dtype, device=qkv.product.device)
    scale = out if qkv.columns is None else qkv.columns
    launch(_rotate_and_store, (rows, triton.cdiv(columns, 1024)))(
        qkv.product, scale, rope.cos, rope.sin, rope.start, out, rope.k_cache, rope.v_cache, rope.slots, rows // batch,
        SCALED=qkv.columns is not None, H=rope.heads, HKV=kv_heads, HD=head_dim, BN=1024,
    )  # fmt: skip
    return out


def gate(gate_up: Wide, dtype: torch.dtype) -> Tensor:
    """silu(gate) * up of a prompt's products [M, 2 F], the gate's columns first. [M, F] in `dtype`."""
    rows, width = gate_up.product.shape[0], gate_up.product.shape[1] // 2
    out = torch.empty(rows, width, dtype=dtype, device=gate_up.product.device)
    launch(_gate, (rows, triton.cdiv(width, 1024)))(
        gate_up.product, out if gate_up.columns is None else gate_up.columns, out,
        SCALED=gate_up.columns is not None, F=width, BF=1024,
    )  # fmt: skip
    return out

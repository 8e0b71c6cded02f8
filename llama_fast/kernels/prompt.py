"""What stands between the matrix products of many rows: rotary + cache write, and the gate. One pass over memory each.

Shapes: M rows (tokens of a batch, T each), H query heads, HKV key/value heads, HD head width, F hidden width.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

import triton
import triton.language as tl


@triton.jit
def _rotate_and_store(
    qkv, scale, cos, sin, start, q_out, k_cache, v_cache, slots, T, SCALED: tl.constexpr,
    H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (M, columns / BN). Row m is token m % T of batch row m // T, at position start[m // T] + m % T. SCALED: columns are
    multiplied by their scales first."""
    N: tl.constexpr = (H + 2 * HKV) * HD
    m = tl.program_id(0).to(tl.int64)
    position = tl.load(start + m // T).to(tl.int64) + m % T
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    pair = tl.program_id(1) * BN + 2 * tl.arange(0, BN // 2)
    value = tl.load(qkv + m * N + n, mask=n < N, other=0)
    value = value.to(tl.float32)
    if SCALED:
        value *= tl.load(scale + n, mask=n < N, other=0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [BN // 2, 2]))
    rotated = pair < (H + HKV) * HD
    angle = position * (HD // 2) + (pair % HD) // 2
    c = tl.load(cos + angle, mask=rotated, other=1)
    s = tl.load(sin + angle, mask=rotated, other=0)
    result = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [BN]).to(q_out.dtype.element_ty)
    head = n // HD
    kv_head = tl.where(head < H + HKV, head - H, head - H - HKV)
    if not isinstance(slots, int) and slots.dtype.is_ptr():  # of a pool of pages [N, HKV, HD]: the slot of each row
        at_cache = (tl.load(slots + m) * HKV + kv_head) * HD + n % HD
    else:
        at_cache = (((m // T) * HKV + kv_head) * slots + position) * HD + n % HD
    tl.store(q_out + m * (H * HD) + n, result, mask=head < H)
    tl.store(k_cache + at_cache, result, mask=(head >= H) & (head < H + HKV))
    tl.store(v_cache + at_cache, result, mask=(head >= H + HKV) & (n < N))


@triton.jit
def _gate(gate_up, scale, out, SCALED: tl.constexpr, F: tl.constexpr, BF: tl.constexpr):
    """Grid (M, F / BF): silu(gate) * up, of columns that are multiplied by their scales first if SCALED."""
    m = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    gate = tl.load(gate_up + m * (2 * F) + f, mask=f < F, other=0).to(tl.float32)
    up = tl.load(gate_up + m * (2 * F) + F + f, mask=f < F, other=0).to(tl.float32)
    if SCALED:
        gate *= tl.load(scale + f, mask=f < F, other=0).to(tl.float32)
        up *= tl.load(scale + F + f, mask=f < F, other=0).to(tl.float32)
    tl.store(out + m * F + f, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=f < F)

"""New keys and values into a cache of eight bits: integers, and a step for each vector.

Shapes: B batch, T tokens, M = B x T rows, HKV key/value heads, HD head width, S slots of a row, N slots of a pool of pages.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

import triton
import triton.language as tl

from llama_fast.kernels.common import start_next, wait

LARGEST: tl.constexpr = tl.constexpr(127.0)
LEAST_STEP: tl.constexpr = tl.constexpr(1e-30)
# 1.5 x 2^23: a float32 of up to 2^22 to either side that is added to it keeps no fraction, and is rounded to nearest, ties to even.
WHOLE: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _keep(new, cache, steps, from_, at, d, HD: tl.constexpr):
    """One vector, from `from_` of the new ones to vector `at` of the cache."""
    value = tl.load(new + from_ + d, mask=d < HD, other=0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(value), 0) / LARGEST, LEAST_STEP)
    whole = tl.div_rn(value, step) + WHOLE - WHOLE
    tl.store(cache + at * HD + d, whole.to(tl.int8), mask=d < HD)
    tl.store(steps + at, step)


@triton.jit
def _in_eight_bits(
    k_new, v_new, k_cache, v_cache, k_steps, v_steps, start, slots, T,
    HKV: tl.constexpr, HD: tl.constexpr, DP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (M, HKV): k_new, v_new [M, HKV, HD] to caches [B, HKV, S, HD] and steps [B, HKV, S], at start[m // T] + m % T.

    `slots`: S; or, where caches are pools [N, HKV, HD], the slot of each row [M].
    """
    m = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    start_next(PDL)
    wait(PDL)
    if not isinstance(slots, int) and slots.dtype.is_ptr():
        at = tl.load(slots + m) * HKV + head
    else:
        at = ((m // T) * HKV + head) * slots + tl.load(start + m // T).to(tl.int64) + m % T
    d = tl.arange(0, DP)
    _keep(k_new, k_cache, k_steps, (m * HKV + head) * HD, at, d, HD)
    _keep(v_new, v_cache, v_steps, (m * HKV + head) * HD, at, d, HD)

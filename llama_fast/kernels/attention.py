"""Decode attention that reads only the cache slots up to each row's position, split over programs along the context.

The grid is fixed (a CUDA graph replays it); how much of the context each program reads is computed on the device from
`start`. Programs of one key/value head serve all its query heads and all T tokens. If the context took more than one program,
the last one to finish adds up the partial results.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

import triton
import triton.language as tl

from llama_fast.kernels.common import INTERPRETED, dot, start_next, wait

# Finite, so that a row with no visible slot in a split gives weight 0 in the sum over splits and not NaN.
HIDDEN = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
# Four bytes w of a word as fp16: w + 128 into the mantissa of 1024, then less 1152. Without the conversions that a GPU does slowly.
BYTES_AS_HALVES: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t, less; mov.b32 less, 0xE480E480; xor.b32 t, $2, 0x80808080;"
    " prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;"
    " add.rn.f16x2 $0, $0, less; add.rn.f16x2 $1, $1, less; }"
)
VALUE_STEPS = tl.constexpr(16.0)
"""Weights of eight-bit values are so many times larger, that fp16 holds small ones."""


@triton.jit
def _slots(
    base, table, lo, first_slot, last_slot, HKV: tl.constexpr, HD: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Keys or values of slots lo .. lo + BS, as far as they lie in first_slot .. last_slot; zeros elsewhere. [BS, DP].

    PAGE: slots of a page, which the table tells of each stretch; 0: they stand one behind the other.
    """
    slot = lo + tl.arange(0, BS)
    d = tl.arange(0, DP)
    inside = ((slot >= first_slot) & (slot < last_slot))[:, None] & (d < HD)[None, :]
    if PAGE:
        page = tl.load(table + slot // PAGE, mask=(slot >= first_slot) & (slot < last_slot), other=0)
        at = (page * PAGE + slot % PAGE) * (HKV * HD)
        return tl.load(base + at[:, None] + d[None, :], mask=inside, other=0)
    else:
        return tl.load(base + slot[:, None] * HD + d[None, :], mask=inside, other=0)


@triton.jit
def _steps(base, table, lo, hi, HKV: tl.constexpr, BS: tl.constexpr, PAGE: tl.constexpr):
    """The steps of eight-bit keys or values of slots lo .. lo + BS, as far as they lie below hi. [BS]."""
    slot = lo + tl.arange(0, BS)
    if PAGE:
        page = tl.load(table + slot // PAGE, mask=slot < hi, other=0)
        return tl.load(base + (page * PAGE + slot % PAGE) * HKV, mask=slot < hi, other=0)
    else:
        return tl.load(base + slot, mask=slot < hi, other=0)


@triton.jit
def _integers(x, kind: tl.constexpr):
    """int8 to fp16 or float32."""
    if INTERPRETED or kind == tl.float32:
        return x.to(kind)
    else:
        return tl.inline_asm_elementwise(BYTES_AS_HALVES, "=&r,=&r,r", [x], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def _attend_to(
    q, k, v, k_steps, v_steps, table, lo, hi, first, row_t, log2_scale, peak, total, acc, HKV: tl.constexpr,
    DP: tl.constexpr, RP: tl.constexpr, BS: tl.constexpr, PAGE: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """One tile of BS slots of the online softmax, in powers of two. EIGHT: keys and values are integers, of steps."""
    slot = lo + tl.arange(0, BS)
    if EIGHT:
        k, v = _integers(k, q.dtype), _integers(v, q.dtype)
    if RP == 1:
        scores = tl.sum(tl.reshape(q, [1, DP]).to(tl.float32) * k.to(tl.float32), 1)[None, :]
    else:
        scores = dot(q, tl.trans(k), tl.zeros([RP, BS], tl.float32))
    scores *= log2_scale
    if EIGHT:
        scores *= _steps(k_steps, table, lo, hi, HKV, BS, PAGE)[None, :]
    seen = (slot < hi)[None, :] & (slot[None, :] <= (first + row_t)[:, None])
    scores = tl.where(seen, scores, HIDDEN)
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    shrink = tl.exp2(peak - new_peak)
    p = tl.exp2(scores - new_peak[:, None])
    total = total * shrink + tl.sum(p, 1)
    if EIGHT:
        p *= VALUE_STEPS * _steps(v_steps, table, lo, hi, HKV, BS, PAGE)[None, :]
    if RP == 1:
        acc = acc * shrink[:, None] + tl.sum(tl.reshape(p, [BS, 1]) * v.to(tl.float32), 0)[None, :]
    else:
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
    return new_peak, total, acc


@triton.jit
def _attend(
    q, k_cache, v_cache, k_steps, v_steps, start, out, part, part_stats, arrived, slots, softmax_scale,
    T: tl.constexpr, G: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, DP: tl.constexpr,
    RP: tl.constexpr, BS: tl.constexpr, SPLITS: tl.constexpr, SPLITS_P: tl.constexpr, E: tl.constexpr, LEAST: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr, PAGE: tl.constexpr, ROW_PAGES: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """Grid (B * HKV, SPLITS). RP: T * G query rows padded (1, or >= 16 for tensor cores). LEAST: fewest slots worth a program.

    PAGE: slots of a page in pools [N, HKV, HD]; `slots` is then the table [B, ROW_PAGES]. 0: `slots` of each row and head.
    EIGHT: caches are int8, and each of their vectors is to be multiplied by its step.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = pair // HKV
    start_next(PDL)
    if not EARLY:
        wait(PDL)
    first = tl.load(start + b).to(tl.int32)
    n = first + T
    share = tl.maximum(tl.cdiv(tl.cdiv(n, SPLITS), BS) * BS, LEAST)
    active = tl.cdiv(n, share)
    if split < active:
        lo = split * share
        hi = tl.minimum(n, lo + share)
        if PAGE:
            k_base = k_cache + (pair % HKV) * HD
            v_base = v_cache + (pair % HKV) * HD
            table = slots + b * ROW_PAGES
            k_steps += pair % HKV
            v_steps += pair % HKV
        else:
            k_base = k_cache + pair.to(tl.int64) * slots * HD
            v_base = v_cache + pair.to(tl.int64) * slots * HD
            table = slots
            k_steps += pair.to(tl.int64) * slots
            v_steps += pair.to(tl.int64) * slots
        # Slots of earlier steps do not depend on the kernel ahead: their first tile travels before the wait.
        k = _slots(k_base, table, lo, 0, tl.minimum(hi, first), HKV, HD, DP, BS, PAGE)
        v = _slots(v_base, table, lo, 0, tl.minimum(hi, first), HKV, HD, DP, BS, PAGE)
        if EARLY:
            wait(PDL)
        r = tl.arange(0, RP)
        d = tl.arange(0, DP)
        row_t = r // G
        # Row r of this program is token r // G, query head r % G of its group.
        at_rows = ((b * T + row_t) * HKV + pair % HKV) * (G * HD) + (r % G) * HD
        mask_rows = (r < T * G)[:, None] & (d < HD)[None, :]
        at_out = at_rows[:, None] + d[None, :]
        query = tl.load(q + at_out, mask=mask_rows, other=0)
        if hi > first:  # this step's own tokens, where they fall in this program's share
            new = (lo + tl.arange(0, BS) >= first)[:, None]
            k = tl.where(new, _slots(k_base, table, lo, first, hi, HKV, HD, DP, BS, PAGE), k)
            v = tl.where(new, _slots(v_base, table, lo, first, hi, HKV, HD, DP, BS, PAGE), v)
        log2_scale = softmax_scale * LOG2_E
        if EIGHT and query.dtype != tl.float32:
            # over a power of two, so that fp16 holds all digits of bf16
            largest = tl.maximum(tl.max(tl.abs(query.to(tl.float32)), 1), 1e-30)
            power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            query = (query.to(tl.float32) / power[:, None]).to(tl.float16)
            log2_scale = (log2_scale * power)[:, None]
        peak = tl.full([RP], HIDDEN, tl.float32)
        total = tl.zeros([RP], tl.float32)
        acc = tl.zeros([RP, DP], tl.float32)
        peak, total, acc = _attend_to(
            query, k, v, k_steps, v_steps, table, lo, hi, first, row_t, log2_scale, peak, total, acc,
            HKV, DP, RP, BS, PAGE, EIGHT,
        )  # fmt: skip
        for tile in tl.range(lo + BS, hi, BS, num_stages=STAGES):
            k_tile = _slots(k_base, table, tile, 0, hi, HKV, HD, DP, BS, PAGE)
            v_tile = _slots(v_base, table, tile, 0, hi, HKV, HD, DP, BS, PAGE)
            peak, total, acc = _attend_to(
                query, k_tile, v_tile, k_steps, v_steps, table, tile, hi, first, row_t, log2_scale, peak, total, acc,
                HKV, DP, RP, BS, PAGE, EIGHT,
            )  # fmt: skip
        if EIGHT:
            acc *= 1 / VALUE_STEPS
        if active == 1:
            tl.store(out + at_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask_rows)
        else:
            at_part = (pair * SPLITS + split) * (T * G) + r
            tl.store(part + at_part[:, None] * HD + d[None, :], acc, mask=mask_rows)
            tl.store(part_stats + at_part * 2, peak, mask=r < T * G)
            tl.store(part_stats + at_part * 2 + 1, total, mask=r < T * G)
            tl.debug_barrier()  # every thread's partial results are written before one thread says so
            before = tl.atomic_add(arrived + pair, 1, sem="acq_rel", scope="gpu")
            if before == active - 1:
                # All splits at once, E of the T * G * HD results at a time: one trip to memory, not one per split.
                p = tl.arange(0, SPLITS_P)
                for first_e in tl.static_range(0, T * G * HD, E):
                    e = first_e + tl.arange(0, E)
                    there = (p < active)[:, None] & (e < T * G * HD)[None, :]
                    at_row = (pair * SPLITS + p)[:, None] * (T * G) + (e // HD)[None, :]
                    peaks = tl.load(part_stats + at_row * 2, mask=there, other=HIDDEN, cache_modifier=".cg")
                    totals = tl.load(part_stats + at_row * 2 + 1, mask=there, other=0, cache_modifier=".cg")
                    accs = tl.load(part + at_row * HD + (e % HD)[None, :], mask=there, other=0, cache_modifier=".cg")
                    weights = tl.where(there, tl.exp2(peaks - tl.max(peaks, 0)[None, :]), 0)
                    value = tl.sum(accs * weights, 0) / tl.maximum(tl.sum(totals * weights, 0), 1e-30)
                    at_e = ((b * T + e // HD // G) * HKV + pair % HKV) * (G * HD) + e // HD % G * HD + e % HD
                    tl.store(out + at_e, value.to(out.dtype.element_ty), mask=e < T * G * HD)
                tl.store(arrived + pair, 0)  # ready for the next launch

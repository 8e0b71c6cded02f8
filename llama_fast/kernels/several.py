"""Linear layers of several rows over weights of less than a byte a column, on tensor cores: int4 in groups, and 2:4 sparse ones.

As `linear._on_tensor_cores`, with the same epilogues. What is stored of a weight tile becomes dense tiles of the activations' type
in registers, exactly: of int4 one of the first four of each eight columns and one of the other four, of sparse weights one of
each column of four. The activations stand in the same order, made by `_in_pieces`, a launch ahead, which norms them as well.
Sums of a group are multiplied by its scale in float32.

Shapes: R weight rows, M activation rows, K columns, of which a load takes BK, P pieces of K / P columns each.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment, var-annotated"
# (functions under triton.jit are compiled from their source; Triton ships no types)

import triton
import triton.language as tl

from llama_fast.kernels.common import INTERPRETED, dot, places_of, start_next, wait
from llama_fast.kernels.linear import _cos_sin, _finish, _live, _residuals, _rows, _scales, _vector_tile
from llama_fast.kernels.widen import _power_of_two

# The nibbles of a word of four bytes $4, lower ones first, as bf16: 128 + n by its bits, then less 128 (or less 136: with signs). As
# fp16: 1024 + n, then less 1024 (or 1032).
HALVES: tl.constexpr = tl.constexpr(
    "{ .reg .b32 l, h, one, middle; mov.b32 one, 0x3F803F80; mov.b32 middle, MIDDLE; and.b32 l, $4, 0x0F0F0F0F; shr.b32 h, $4, 4; and.b32 h, h, 0x0F0F0F0F;"
    " prmt.b32 $0, l, 0x43434343, 0x4140; prmt.b32 $1, l, 0x43434343, 0x4342;"
    " prmt.b32 $2, h, 0x43434343, 0x4140; prmt.b32 $3, h, 0x43434343, 0x4342;"
    " fma.rn.bf16x2 $0, $0, one, middle; fma.rn.bf16x2 $1, $1, one, middle;"
    " fma.rn.bf16x2 $2, $2, one, middle; fma.rn.bf16x2 $3, $3, one, middle; }"
)
LESS_136: tl.constexpr = tl.constexpr(HALVES.value.replace("MIDDLE", "0xC308C308"))
LESS_128: tl.constexpr = tl.constexpr(HALVES.value.replace("MIDDLE", "0xC300C300"))
AS_FP16: tl.constexpr = tl.constexpr(
    HALVES.value.replace("0x43434343", "0x64646464").replace("bf16x2", "f16x2").replace("0x3F803F80", "0x3C003C00")
)
LESS_1032: tl.constexpr = tl.constexpr(AS_FP16.value.replace("MIDDLE", "0xE408E408"))
LESS_1024: tl.constexpr = tl.constexpr(AS_FP16.value.replace("MIDDLE", "0xE400E400"))
LIFT: tl.constexpr = tl.constexpr(64.0)
"""By this fp16 weights are larger than they are, so that scales of 1e-6 to 127 leave none of them subnormal, and none infinite."""


@triton.jit
def _nibbles(bytes, kind: tl.constexpr, ZERO: tl.constexpr):
    """The lower and the upper nibble of every byte as numbers: 0 to 15 if ZERO, else -8 to 7."""
    if INTERPRETED or kind == tl.float32:
        middle: tl.constexpr = 0 if ZERO else 8
        lower, upper = (bytes & 15) - middle, ((bytes >> 4) & 15) - middle
        return lower.to(tl.float32).to(kind), upper.to(tl.float32).to(kind)
    elif kind == tl.bfloat16:
        asm: tl.constexpr = LESS_128 if ZERO else LESS_136
        return tl.inline_asm_elementwise(
            asm, "=&r,=&r,=&r,=&r,r", [bytes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        asm16: tl.constexpr = LESS_1024 if ZERO else LESS_1032
        return tl.inline_asm_elementwise(
            asm16, "=&r,=&r,=&r,=&r,r", [bytes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )


@triton.jit
def _less(a, b):
    """a - b, in their type. The interpreter subtracts bf16 by its bit patterns, so there by way of float32."""
    if INTERPRETED:
        return (a.to(tl.float32) - b.to(tl.float32)).to(a.dtype)
    return a - b


@triton.jit
def _pair(word, FP16: tl.constexpr):
    """The two scales of a word, the first in its lower half, as float32."""
    if FP16:
        first, second = word.to(tl.int16), (word >> 16).to(tl.int16)
        return first.to(tl.float16, bitcast=True).to(tl.float32), second.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _over_groups(of_groups, R: tl.constexpr, C: tl.constexpr, G: tl.constexpr, SLICES: tl.constexpr):
    """A number of each group, for each byte of its columns: [SLICES, R, C / 2] or [R, C / 2]."""
    if SLICES:
        wide = tl.reshape(of_groups, [SLICES, R, C // G, 1])
        return tl.reshape(tl.broadcast_to(wide, [SLICES, R, C // G, G // 2]), [SLICES, R, C // 2])
    else:
        return tl.reshape(tl.broadcast_to(tl.reshape(of_groups, [R, C // G, 1]), [R, C // G, G // 2]), [R, C // 2])


@triton.jit
def _columns(first, BW: tl.constexpr, SLICES: tl.constexpr, LOADS: tl.constexpr):
    """Columns of one load: [SLICES, BW / SLICES], a slice's loads side by side; or [BW]."""
    if SLICES:
        C: tl.constexpr = BW // SLICES
        return first + tl.arange(0, SLICES)[:, None] * (LOADS * C) + tl.arange(0, C)[None, :]
    else:
        return first + tl.arange(0, BW)


@triton.jit
def _at(part, rows, live, col, W: tl.constexpr, SLICES: tl.constexpr, CHECK: tl.constexpr):
    """part[rows, col] of a part with W columns: [SLICES, R, C] or [R, C]; zeros outside."""
    if SLICES:
        at = part + rows.to(tl.int64)[None, :, None] * W + col[:, None, :]
        if CHECK:
            return tl.load(at, mask=live[None, :, None] & (col < W)[:, None, :], other=0)
        else:
            return tl.load(at)
    else:
        at = part + rows.to(tl.int64)[:, None] * W + col[None, :]
        if CHECK:
            return tl.load(at, mask=live[:, None] & (col < W)[None, :], other=0)
        else:
            return tl.load(at)


@triton.jit
def _of_slice(
    part, rows, live, first, K: tl.constexpr, EACH: tl.constexpr, C: tl.constexpr, SLICES: tl.constexpr,
    LOADS: tl.constexpr,
):  # fmt: skip
    """Of a part with a number for EACH columns, those of a slice's column `first`: [SLICES, R, 1] or [R, 1]; zeros outside."""
    if SLICES:
        at = (first + tl.arange(0, SLICES) * (LOADS * C)) // EACH
        pointers = part + rows.to(tl.int64)[None, :] * (K // EACH) + at[:, None]
        return tl.load(pointers, mask=live[None, :] & (at < K // EACH)[:, None], other=0)[:, :, None]
    else:
        at = first // EACH
        return tl.load(part + rows.to(tl.int64) * (K // EACH) + at, mask=live & (at < K // EACH), other=0)[:, None]


@triton.jit
def _piece(
    x, PIECE: tl.constexpr, RUN: tl.constexpr, P: tl.constexpr, first, M: tl.constexpr, MP: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, LOADS: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """One piece of the activations at the columns of a load: [SLICES, C, MP] or [C, MP]."""
    m = tl.arange(0, MP)
    W: tl.constexpr = K // P
    col = _columns(first // P, BK // P, SLICES, LOADS)
    if SLICES:
        at = x + (PIECE * M + m[None, None, :]) * W + col[:, :, None]
        if CHECK:
            return tl.load(at, mask=(m < M)[None, None, :] & (col < W)[:, :, None], other=0)
        elif M < MP:
            return tl.load(at, mask=(m < M)[None, None, :], other=0)
        else:
            return tl.load(at)
    else:
        at = x + (PIECE * M + m[None, :]) * W + col[:, None]
        if CHECK:
            return tl.load(at, mask=(m < M)[None, :] & (col < W)[:, None], other=0)
        elif M < MP:
            return tl.load(at, mask=(m < M)[None, :], other=0)
        else:
            return tl.load(at)


@triton.jit
def _stored_at(
    weight, places, group_scale, zero, rows, live, first, K: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
    SLICES: tl.constexpr, LOADS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, SCALES: tl.constexpr, FP16: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """All that is stored of LOADS loads from column `first` on: tuples of values, of scales (or words of two) or places, of zeros."""
    C: tl.constexpr = BK // SLICES if SLICES else BK
    values, others, zeros = (), (), ()
    for i in tl.static_range(LOADS):
        at = first + i * C
        values = values + (_at(weight, rows, live, _columns(at // 2, BK // 2, SLICES, LOADS), K // 2, SLICES, CHECK),)
        if KIND == "int4":
            if SCALES == "folded":
                col = _columns(at // (2 * G), BK // (2 * G), SLICES, LOADS)
                others = others + (_at(group_scale, rows, live, col, K // (2 * G), SLICES, CHECK),)
                if ZERO:
                    col = _columns(at // G, BK // G, SLICES, LOADS)
                    zeros = zeros + (_at(zero, rows, live, col, K // G, SLICES, CHECK),)
            elif ZERO:
                zeros = zeros + (_of_slice(zero, rows, live, at, K, G, C, SLICES, LOADS),)
            if SCALES == "one":
                others = others + (_of_slice(group_scale, rows, live, at, K, G, C, SLICES, LOADS),)
            elif SCALES == "pairs" and i % 2 == 0:
                others = others + (_of_slice(group_scale, rows, live, at, K, 2 * G, C, SLICES, LOADS),)
        else:
            others = others + (
                _at(places, rows, live, _columns(at // 32, BK // 32, SLICES, LOADS), K // 32, SLICES, CHECK),
            )
    return values, others, zeros


@triton.jit
def _times(
    stored, x, first, acc, M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
    SLICES: tl.constexpr, LOADS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, SCALES: tl.constexpr, FP16: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """acc + what is stored of LOADS loads from column `first` on, times the activations there."""
    kind = x.dtype.element_ty
    C: tl.constexpr = BK // SLICES if SLICES else BK
    values, others, zeros = stored
    for i in tl.static_range(LOADS):
        at = first + i * C
        if SCALES == "folded":
            lower, upper = _nibbles(values[i], kind, ZERO)
            first_of, second_of = _pair(others[i], FP16)
            scale = _over_groups(tl.join(first_of * LIFT, second_of * LIFT).to(kind), R, C, G, SLICES)
            if ZERO:
                lowest = _over_groups(zeros[i].to(tl.float32).to(kind), R, C, G, SLICES)
                lower, upper = lower - lowest, upper - lowest
            acc = dot(lower * scale, _piece(x, 0, 4, 2, at, M, MP, K, BK, SLICES, LOADS, CHECK), acc)
            acc = dot(upper * scale, _piece(x, 1, 4, 2, at, M, MP, K, BK, SLICES, LOADS, CHECK), acc)
        elif KIND == "int4":
            lower, upper = _nibbles(values[i], kind, ZERO)
            if ZERO:
                lowest = zeros[i].to(tl.float32).to(kind)
                lower, upper = _less(lower, lowest), _less(upper, lowest)
            total = tl.zeros([SLICES, R, MP], tl.float32) if SLICES else tl.zeros([R, MP], tl.float32)
            total = dot(lower, _piece(x, 0, 4, 2, at, M, MP, K, BK, SLICES, LOADS, CHECK), total)
            total = dot(upper, _piece(x, 1, 4, 2, at, M, MP, K, BK, SLICES, LOADS, CHECK), total)
            scale = _pair(others[i // 2], FP16)[i % 2] if SCALES == "pairs" else others[i].to(tl.float32)
            acc += total * scale
        else:
            numbers = values[i].to(tl.float32).to(kind)
            if SLICES:
                id = others[i][:, :, :, None] >> (4 * tl.arange(0, 8))[None, None, None, :]
                id = tl.reshape(id, [SLICES, R, C // 4]) & 7
                of_lower, of_upper = tl.split(tl.reshape(numbers, [SLICES, R, C // 4, 2]))
            else:
                id = tl.reshape(others[i][:, :, None] >> (4 * tl.arange(0, 8))[None, None, :], [R, C // 4]) & 7
                of_lower, of_upper = tl.split(tl.reshape(numbers, [R, C // 4, 2]))
            lower, upper = places_of(id)
            for j in tl.static_range(4):
                dense = tl.where(lower == j, of_lower, tl.where(upper == j, of_upper, 0.0).to(kind))
                acc = dot(dense, _piece(x, j, 1, 4, at, M, MP, K, BK, SLICES, LOADS, CHECK), acc)
    return acc


@triton.jit
def _several_rows(
    x, factors, weight, places, group_scale, zero, scale, residual, out, start, cos, sin, k_cache, v_cache, slots,
    KIND: tl.constexpr, G: tl.constexpr, ZERO: tl.constexpr, SCALES: tl.constexpr, FP16: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    SLICES: tl.constexpr, LOADS: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr, T: tl.constexpr,
    SCALED: tl.constexpr, EPILOGUE: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """M activation rows, in pieces, times what is stored. KIND "int4": bytes [N, K / 2]; "sparse", "sparse_int8": values [N, K / 2] and
    words of places [N, K / 32]. A slice of BK / SLICES columns (SLICES 0: all BK, by a warp group) lies within a group of int4.
    LOADS: in a step of the loop. AHEAD: steps that are loaded into registers before the wait, and used last.
    SCALES: "one" by one; "pairs", in words of two (FP16, or bf16): what is smaller than a word cannot be copied into shared memory
    while the step before is worked on; "folded": a slice has several groups, and weights are multiplied by their scales before the
    product, in fp16: exactly with bf16 scales and no zero points, else to 2^-12. x then is fp16, to be multiplied by `factors` [M].
    """
    STEP: tl.constexpr = LOADS * BK
    CHECK: tl.constexpr = (N % R != 0) or (K % STEP != 0)
    block = tl.program_id(0)
    start_next(PDL)
    rows = _rows(block, N, R, EPILOGUE)
    live = _live(rows, N, EPILOGUE, block * (R // 2))
    scales = _scales(scale, rows, live, SCALED)
    ahead = ()
    for i in tl.static_range(AHEAD):
        ahead = ahead + (
            _stored_at(weight, places, group_scale, zero, rows, live, i * STEP, K, BK, G, SLICES, LOADS, KIND, ZERO,
                       SCALES, FP16, CHECK),
        )  # fmt: skip
    wait(PDL)
    residuals = _residuals(residual, rows, live, N, M, MP, EPILOGUE)
    cos_sin = _cos_sin(start, cos, sin, block, R, M, MP, T, EPILOGUE, H, HKV, HD)
    acc = tl.zeros([SLICES, R, MP], tl.float32) if SLICES else tl.zeros([R, MP], tl.float32)
    for first in tl.range(AHEAD * STEP, K, STEP, num_stages=STAGES):
        stored = _stored_at(weight, places, group_scale, zero, rows, live, first, K, BK, G, SLICES, LOADS, KIND, ZERO,
                            SCALES, FP16, CHECK)  # fmt: skip
        acc = _times(stored, x, first, acc, M, MP, K, R, BK, G, SLICES, LOADS, KIND, ZERO, SCALES, FP16, CHECK)
    for i in tl.static_range(AHEAD):
        acc = _times(ahead[i], x, i * STEP, acc, M, MP, K, R, BK, G, SLICES, LOADS, KIND, ZERO, SCALES, FP16, CHECK)
    acc_RM = tl.sum(acc, 0) if SLICES else acc
    if SCALES == "folded":
        m = tl.arange(0, MP)
        acc_RM *= (tl.load(factors + m, mask=m < M, other=0) / LIFT)[None, :]
    _finish(acc_RM, rows, live, block, scales, residuals, cos_sin, out, k_cache, v_cache, slots,
            M, MP, N, R, T, EPILOGUE, SCALED, H, HKV, HD)  # fmt: skip


@triton.jit
def _in_pieces(
    x, gain, out, factors, eps, M, K: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, RUN: tl.constexpr, P: tl.constexpr,
    HALVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (M,): rows of x [M, K], behind an RMS norm if NORM, in P pieces [P, M, K / P]: of each P x RUN columns each has RUN.

    HALVED: over their powers of two, which no fp16 number then leaves; these go to factors [M].
    """
    start_next(PDL)
    row = tl.program_id(0)
    gains = _vector_tile(gain, 0, K, BK).to(tl.float32) if NORM else 1.0
    wait(PDL)
    value = _vector_tile(x + row * K, 0, K, BK).to(tl.float32)
    if NORM:
        value *= tl.rsqrt(tl.sum(value * value, 0) / K + eps) * gains
    if HALVED:
        power = _power_of_two(tl.maximum(tl.max(tl.abs(value), 0), 1e-30))
        value /= power
        tl.store(factors + row, power)
    col = tl.arange(0, BK)
    at = out + ((col // RUN) % P * M + row) * (K // P) + col // (P * RUN) * RUN + col % RUN
    tl.store(at, value.to(out.dtype.element_ty), mask=col < K)

"""Linear layers of one row, or two, over weights in words or groups: int4 and fp8 in groups, and 2:4 sparse ones.

As `linear._in_registers`, with the same prologues and epilogues; what differs is the product. Activations become integers of
22 bits (20 for sparse int8 weights) behind the norm: x ~ q * f, with one f for a row. An integer is three bytes, its limbs, and
the bytes of four neighbouring columns make a word, so that `dp4a` multiplies four weights by four limbs in one instruction
and sums them exactly. The error is that of the 22 bits: under 3e-7 of the row's largest activation. Every program makes the
limbs for itself, or, where rows are long, finds them made by `_limbs_apart`, a launch ahead. bf16 values of sparse weights are
multiplied as they are, by the activations that their places name, and fp8 numbers as float32. Several rows go through `several._several_rows`.

Shapes: R weight rows, M activation rows, K columns, of which a load takes BK; a word holds 8 columns, a quad is 4 words.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment, var-annotated"
# (functions under triton.jit are compiled from their source; Triton ships no types)

import triton
import triton.language as tl

from llama_fast.kernels.common import INTERPRETED, places_of, start_next, wait
from llama_fast.kernels.linear import _cos_sin, _finish, _live, _residuals, _rows, _scales, _vector_tile
from llama_fast.kernels.packets import _own_epoch, _own_inbox, _send_rows

ROUNDING: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 of this size has steps of one
ROUNDED: tl.constexpr = tl.constexpr(0x4B400000)  # its bits
# Bytes 0, 1 and 2 of four integers, each as a word, the first integer's lowest: $0 low, $1 middle, $2 top.
LIMBS: tl.constexpr = tl.constexpr(
    "{ .reg .b32 a, b, c, d;"
    " prmt.b32 a, $3, $4, 0x5140; prmt.b32 b, $5, $6, 0x5140; prmt.b32 c, $3, $4, 0x0062; prmt.b32 d, $5, $6, 0x0062;"
    " prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632; prmt.b32 $2, c, d, 0x5410; }"
)
# Four int8 values of a word $2 at the places that the two nibbles of $3 name, zeros elsewhere: $0 the first four columns, $1 the
# next. The tables hold, for each pair of places, which byte goes to columns 0 and 1, and which to 2 and 3 (4: a zero).
PLACED: tl.constexpr = tl.constexpr(
    "{ .reg .b32 l, h, m, n;"
    " prmt.b32 l, 0x04404010, 0x00004404, $3; prmt.b32 h, 0x41144144, 0x00001014, $3; prmt.b32 l, l, h, 0x0040;"
    " prmt.b32 m, 0x24424232, 0x00004424, $3; prmt.b32 n, 0x43344344, 0x00003234, $3; prmt.b32 m, m, n, 0x0051;"
    " prmt.b32 $0, $2, 0, l; prmt.b32 $1, $2, 0, m; }"
)


@triton.jit
def _dp4a(a, b, c, KIND: tl.constexpr):
    """c + the sum of four products of bytes; KIND as "u32.s32": whether the bytes of a, and those of b, have signs."""
    if INTERPRETED:
        for i in tl.static_range(4):
            x, y = (a >> (8 * i)) & 255, (b >> (8 * i)) & 255
            if KIND == "s32.s32" or KIND == "s32.u32":
                x = tl.where(x >= 128, x - 256, x)
            if KIND == "s32.s32" or KIND == "u32.s32":
                y = tl.where(y >= 128, y - 256, y)
            c = c + x * y
        return c
    else:
        asm: tl.constexpr = "dp4a." + KIND + " $0, $1, $2, $3;"
        return tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _limbs(a, b, c, d):
    """(low, middle, top) words of four integers of 24 bits each."""
    if INTERPRETED:
        low = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24
        middle = (a >> 8 & 255) | (b >> 8 & 255) << 8 | (c >> 8 & 255) << 16 | (d >> 8 & 255) << 24
        top = (a >> 16 & 255) | (b >> 16 & 255) << 8 | (c >> 16 & 255) << 16 | (d >> 16 & 255) << 24
        return low, middle, top
    else:
        return tl.inline_asm_elementwise(
            LIMBS, "=&r,=&r,=&r,r,r,r,r", [a, b, c, d], dtype=(tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )


@triton.jit
def _placed(values, ids):
    """Two dense words of int8 for each word of four stored values; `ids`: the numbers of their pairs, two nibbles."""
    if INTERPRETED:
        first, second = tl.zeros_like(values), tl.zeros_like(values)
        for i in tl.static_range(4):
            byte, id = (values >> (8 * i)) & 255, (ids >> (4 * (i // 2))) & 7
            lower, upper = places_of(id)
            at = byte << (8 * (lower if i % 2 == 0 else upper))
            if i < 2:
                first |= at
            else:
                second |= at
        return first, second
    else:
        return tl.inline_asm_elementwise(
            PLACED, "=&r,=&r,r,r", [values, ids], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )


@triton.jit
def _tile(part, rows, live, FIRST: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, CHECK: tl.constexpr):
    """part[rows, FIRST : FIRST + BW] of a part with W columns, zeros outside."""
    cols = FIRST + tl.arange(0, BW)
    pointers = part + rows.to(tl.int64)[:, None] * W + cols[None, :]
    if CHECK or FIRST + BW > W:
        return tl.load(pointers, mask=live[:, None] & (cols < W)[None, :], other=0.0, eviction_policy="evict_first")
    return tl.load(pointers, eviction_policy="evict_first")


@triton.jit
def _of_groups(
    part, rows, live, FIRST: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """A number of each group of G columns, part [N, K / G], for each EACH of BK columns from column FIRST on: [R, BK / EACH]."""
    at = FIRST // EACH + tl.arange(0, BK // EACH)
    pointers = part + rows.to(tl.int64)[:, None] * (K // G) + (at // (G // EACH))[None, :]
    return tl.load(pointers, mask=live[:, None] & (at < K // EACH)[None, :], other=0)


@triton.jit
def _block_parts(
    weight, places, group_scale, zero, rows, live,
    K: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """All that is stored of some rows: three tuples with an entry for each BK columns."""
    PER: tl.constexpr = 2 if KIND == "sparse" else 8  # columns of an element: of a value, or of a word
    weights, scales, others = (), (), ()
    for i in tl.static_range((K + BK - 1) // BK):
        if KIND == "int4":
            weights = weights + (_tile(weight, rows, live, i * BK // 8, K // 8, BK // 8, CHECK),)
            scales = scales + (_of_groups(group_scale, rows, live, i * BK, K, BK, G, 32),)
            others = others + (_of_groups(zero, rows, live, i * BK, K, BK, G, 32),) if ZERO else others + (0,)
        elif KIND == "fp8":
            weights = weights + (_tile(weight, rows, live, i * BK, K, BK, CHECK),)
            scales = scales + (_of_groups(group_scale, rows, live, i * BK, K, BK, G, 16),)
            others = others + (0,)
        else:
            weights = weights + (_tile(weight, rows, live, i * BK // PER, K // PER, BK // PER, CHECK),)
            others = others + (_tile(places, rows, live, i * BK // 32, K // 32, BK // 32, CHECK),)
            scales = scales + (0,)
    return weights, scales, others


@triton.jit
def _quarters(x, N: tl.constexpr):
    """x [4 N] as four vectors [N]: elements 4 i, 4 i + 1, 4 i + 2 and 4 i + 3."""
    even, odd = tl.split(tl.reshape(x, [N, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _rounded(x, inverse):
    """x * inverse to the nearest integer, of under 2^22."""
    return (x * inverse + ROUNDING).to(tl.int32, bitcast=True) - ROUNDED


@triton.jit
def _as_limbs(q, BK: tl.constexpr):
    """Of integers of columns [BK]: (low, middle, top) words [BK / 8] of the first four of each eight columns, then of the other four; and the sum
    of each quad's integers [BK / 32]."""
    a, b, c, d = _quarters(q, BK // 4)
    low, middle, top = _limbs(a, b, c, d)
    low0, low1 = tl.split(tl.reshape(low, [BK // 8, 2]))
    middle0, middle1 = tl.split(tl.reshape(middle, [BK // 8, 2]))
    top0, top1 = tl.split(tl.reshape(top, [BK // 8, 2]))
    sums = tl.sum(tl.reshape(a + b + c + d, [BK // 32, 8]), 1)
    return low0, middle0, top0, low1, middle1, top1, sums


@triton.jit
def _integers(value, gains, eps, K: tl.constexpr, NORM: tl.constexpr, MOST: tl.constexpr):
    """A row of activations, behind an RMS norm if NORM, as (integers of up to MOST, their factor); NaN shows in the factor."""
    factor = tl.sum(value * 0, 0)  # an integer shows no NaN
    if NORM:
        factor += tl.rsqrt(tl.sum(value * value, 0) / K + eps)
        value *= gains
    else:
        factor += 1.0
    most = tl.maximum(tl.max(tl.abs(value), 0), 1e-30)
    return _rounded(value, MOST / most), factor * (most / MOST)


@triton.jit
def _limbs_apart(
    x, gain, limbs, factors, eps, K: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, MOST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (M,): rows of x [M, K], behind an RMS norm if NORM, as limbs and their factors [M]: x ~ q * factor.

    Of a row: six vectors [K / 8] as `_as_limbs` orders them, then the sums of quads [K / 32].
    """
    start_next(PDL)
    row = tl.program_id(0)
    gains = _vector_tile(gain, 0, K, BK).to(tl.float32) if NORM else 1.0
    wait(PDL)
    value = _vector_tile(x + row * K, 0, K, BK).to(tl.float32)
    q, factor = _integers(value, gains, eps, K, NORM, MOST)
    tl.store(factors + row, factor)
    found = _as_limbs(q, BK)
    at = limbs + row * (6 * K // 8 + K // 32)
    words, quads = tl.arange(0, BK // 8), tl.arange(0, BK // 32)
    for i in tl.static_range(6):
        tl.store(at + i * (K // 8) + words, found[i], mask=words < K // 8)
    tl.store(at + 6 * K // 8 + quads, found[6], mask=quads < K // 32)


@triton.jit
def _limbs_at(limbs, FIRST: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """As `_as_limbs` of columns FIRST to FIRST + BK, of a row that `_limbs_apart` made."""
    return (
        _vector_tile(limbs, FIRST // 8, K // 8, BK // 8),
        _vector_tile(limbs + K // 8, FIRST // 8, K // 8, BK // 8),
        _vector_tile(limbs + 2 * (K // 8), FIRST // 8, K // 8, BK // 8),
        _vector_tile(limbs + 3 * (K // 8), FIRST // 8, K // 8, BK // 8),
        _vector_tile(limbs + 4 * (K // 8), FIRST // 8, K // 8, BK // 8),
        _vector_tile(limbs + 5 * (K // 8), FIRST // 8, K // 8, BK // 8),
        _vector_tile(limbs + 6 * (K // 8), FIRST // 32, K // 32, BK // 32),
    )


@triton.jit
def _int_product(first, second, x, SIGN: tl.constexpr, R: tl.constexpr, BW: tl.constexpr):
    """Dense words of the first and the other four of each eight columns [R, BW] times limbs: int32 sums over quads [R, BW / 4]."""
    low0, middle0, top0, low1, middle1, top1, _ = x
    zeros = tl.zeros([R, BW], tl.int32)
    total = _dp4a(first, tl.broadcast_to(top0[None, :], [R, BW]), zeros, SIGN + ".s32")
    total = _dp4a(second, tl.broadcast_to(top1[None, :], [R, BW]), total, SIGN + ".s32")
    part = _dp4a(first, tl.broadcast_to(middle0[None, :], [R, BW]), zeros, SIGN + ".u32")
    total = (total << 8) + _dp4a(second, tl.broadcast_to(middle1[None, :], [R, BW]), part, SIGN + ".u32")
    part = _dp4a(first, tl.broadcast_to(low0[None, :], [R, BW]), zeros, SIGN + ".u32")
    total = (total << 8) + _dp4a(second, tl.broadcast_to(low1[None, :], [R, BW]), part, SIGN + ".u32")
    return tl.sum(tl.reshape(total, [R, BW // 4, 4]), 2)


@triton.jit
def _narrow_products(
    weights, scales, others, xs, factors, M: tl.constexpr, MP: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """[R, MP]: each weight row times each row of activations, xs[m * chunks + chunk]."""
    CHUNKS: tl.constexpr = (K + BK - 1) // BK
    BW: tl.constexpr = BK // 8
    EACH: tl.constexpr = 4 if KIND == "sparse" else 16 if KIND == "fp8" else 32  # columns of which a thread has the sum
    accs = ()
    for _ in tl.static_range(M):
        accs = accs + (tl.zeros([R, BK // EACH], tl.float32),)
    for i in tl.static_range(CHUNKS):
        grown = ()
        if KIND == "int4":
            first, second = weights[i] & 0x0F0F0F0F, (weights[i] >> 4) & 0x0F0F0F0F
            scale = scales[i].to(tl.float32)
            zero = others[i].to(tl.int32) if ZERO else 8
            for m in tl.static_range(M):
                x = xs[m * CHUNKS + i]
                # less the zero's share; sums wrap around at 32 bits, their difference fits
                total = _int_product(first, second, x, "u32", R, BW) - zero * tl.broadcast_to(
                    x[6][None, :], [R, BW // 4]
                )
                grown = grown + (accs[m] + total.to(tl.float32) * scale,)
        elif KIND == "fp8":
            wide, scale = weights[i].to(tl.float32), scales[i].to(tl.float32)
            for m in tl.static_range(M):
                product = tl.reshape(wide * xs[m * CHUNKS + i][None, :], [R, BK // 16, 16])
                grown = grown + (accs[m] + tl.sum(product, 2) * scale,)
        elif KIND == "sparse_int8":
            ids = tl.reshape(others[i][:, :, None] >> (8 * tl.arange(0, 4))[None, None, :], [R, BW])
            first, second = _placed(weights[i], ids)
            for m in tl.static_range(M):
                total = _int_product(first, second, xs[m * CHUNKS + i], "s32", R, BW)
                grown = grown + (accs[m] + total.to(tl.float32),)
        else:
            id = tl.reshape(others[i][:, :, None] >> (4 * tl.arange(0, 8))[None, None, :], [R, BK // 4]) & 7
            lower, upper = tl.split(tl.reshape(weights[i].to(tl.float32), [R, BK // 4, 2]))
            for m in tl.static_range(M):
                a, b, c, d = xs[m * CHUNKS + i]
                of_lower = tl.where(id < 3, a[None, :], tl.where(id < 5, b[None, :], c[None, :]))
                of_upper = tl.where(id == 0, b[None, :], tl.where((id & 5) == 1, c[None, :], d[None, :]))
                grown = grown + (accs[m] + lower * of_lower + upper * of_upper,)
        accs = grown
    sums = ()
    for m in tl.static_range(M):
        sums = sums + (tl.sum(accs[m], 1) * factors[m],)
    if M == 1:
        return sums[0][:, None]
    columns = tl.arange(0, MP)[None, :]
    acc_RM = tl.zeros([R, MP], tl.float32)
    for m in tl.static_range(M):
        acc_RM = tl.where(columns == m, sums[m][:, None], acc_RM)
    return acc_RM


@triton.jit(do_not_specialize=["rank"])
def _narrow(
    x, gain, weight, places, group_scale, zero, scale, residual, out, start, cos, sin, k_cache, v_cache, slots, eps,
    KIND: tl.constexpr, G: tl.constexpr, ZERO: tl.constexpr, APART: tl.constexpr, MOST: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    T: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCKS: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr,
    inboxes, epochs, rank, SIZE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """As `linear._in_registers`. KIND "int4": words [N, K / 8], a scale and, if ZERO, a zero for each G columns; "fp8": numbers [N, K]
    and a scale for each G columns; "sparse": values
    [N, K / 2] and words of places [N, K / 32]; "sparse_int8": the values as words of four, [N, K / 8]. MOST: the largest integer
    that an activation becomes (0: it stays a number): of "int4" 2^22 - 1, of "sparse_int8" 2^20 - 1, so that the sum of a quad's products fits into 32
    bits. APART: x holds limbs, and `gain` their factors, as `_limbs_apart` made them."""
    CHECK: tl.constexpr = N % (R * BLOCKS) != 0
    CHUNKS: tl.constexpr = (K + BK - 1) // BK
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    start_next(PDL)
    rows = _rows(program, N, R, EPILOGUE)
    live = _live(rows, N, EPILOGUE, program * (R // 2))
    weights, scales_RQ, others = _block_parts(
        weight, places, group_scale, zero, rows, live, K, BK, G, KIND, ZERO, CHECK
    )
    scales = _scales(scale, rows, live, SCALED)
    gains = ()
    if NORM:
        for i in tl.static_range(CHUNKS):
            gains = gains + (_vector_tile(gain, i * BK, K, BK),)
    if EARLY:
        cos_sin = _cos_sin(start, cos, sin, program, R, M, MP, T, EPILOGUE, H, HKV, HD)
    if EPILOGUE == "send":
        inbox = _own_inbox(inboxes, rank, R, SIZE, THREADS)
    wait(PDL)
    residuals = _residuals(residual, rows, live, N, M, MP, EPILOGUE)
    if not EARLY:
        cos_sin = _cos_sin(start, cos, sin, program, R, M, MP, T, EPILOGUE, H, HKV, HD)
    xs, factors = (), ()
    for m in tl.static_range(M if APART else 0):
        factors = factors + (tl.load(gain + m),)
        for i in tl.static_range(CHUNKS):
            xs = xs + (_limbs_at(x + m * (6 * K // 8 + K // 32), i * BK, K, BK),)
    for m in tl.static_range(0 if APART else M):
        squares = tl.zeros([BK], tl.float32)
        largest = tl.zeros([BK], tl.float32)
        broken = tl.zeros([BK], tl.float32)
        values = ()
        for i in tl.static_range(CHUNKS):
            value = _vector_tile(x + m * K, i * BK, K, BK).to(tl.float32)
            if NORM:
                squares += value * value
                value *= gains[i].to(tl.float32)
            elif MOST > 0:
                broken += value * 0  # an integer shows no NaN
            largest = tl.maximum(largest, tl.abs(value))
            values = values + (value,)
        factor = 1.0
        if NORM:
            factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        if KIND == "fp8":
            xs = xs + values
        elif KIND == "sparse":
            for i in tl.static_range(CHUNKS):
                xs = xs + (_quarters(values[i], BK // 4),)
        else:
            most = tl.maximum(tl.max(largest, 0), 1e-30)
            inverse = MOST / most
            factor *= most / MOST
            if not NORM:
                factor += tl.sum(broken, 0)
            for i in tl.static_range(CHUNKS):
                xs = xs + (_as_limbs(_rounded(values[i], inverse), BK),)
        factors = factors + (factor,)
    counts = ()
    if EPILOGUE == "send":
        for i in tl.static_range(BLOCKS):
            counts = counts + (_own_epoch(epochs, program + i * programs, N, R, BLOCK, THREADS),)
    for i in tl.static_range(BLOCKS):
        block = program + i * programs
        if i + 1 < BLOCKS:  # what the next block needs travels while this one is worked on
            next_rows = _rows(block + programs, N, R, EPILOGUE)
            next_live = _live(next_rows, N, EPILOGUE, (block + programs) * (R // 2))
            next_weights, next_scales_RQ, next_others = _block_parts(
                weight, places, group_scale, zero, next_rows, next_live, K, BK, G, KIND, ZERO, CHECK
            )
            next_scales = _scales(scale, next_rows, next_live, SCALED)
            next_residuals = _residuals(residual, next_rows, next_live, N, M, MP, EPILOGUE)
            next_cos_sin = _cos_sin(start, cos, sin, block + programs, R, M, MP, T, EPILOGUE, H, HKV, HD)
        acc_RM = _narrow_products(weights, scales_RQ, others, xs, factors, M, MP, R, K, BK, KIND, ZERO)
        if EPILOGUE == "send":
            value_R = tl.sum(acc_RM * scales[:, None] if SCALED else acc_RM, 1)
            _send_rows(value_R, block, counts[i], inbox, rank, N, R, SIZE, WORDS, THREADS)
        _finish(acc_RM, rows, live, block, scales, residuals, cos_sin, out, k_cache, v_cache, slots,
                M, MP, N, R, T, EPILOGUE, SCALED, H, HKV, HD)  # fmt: skip
        if i + 1 < BLOCKS:
            weights, scales_RQ, others, rows, live = next_weights, next_scales_RQ, next_others, next_rows, next_live
            scales, residuals, cos_sin = next_scales, next_residuals, next_cos_sin

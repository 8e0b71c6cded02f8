"""Linear layers of several rows over weights in words or groups, on tensor cores: int4 and fp8 in groups, and 2:4 sparse ones.

As `linear._on_tensor_cores`, with the same epilogues. What is stored of a weight tile becomes dense tiles of the activations' type
in registers, exactly: of int4 one of the first four of each eight columns and one of the other four, of sparse weights one of
the first two of each four columns and one of the last two. The activations stand in the same order, made by `_in_pieces`, a
launch ahead, which norms them as well. Sums of a group are multiplied by its scale in float32.

Shapes: R weight rows, M activation rows, K columns, of which a load takes BK, P pieces of K / P columns each.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment, var-annotated"
# (functions under triton.jit are compiled from their source; Triton ships no types)

import triton
import triton.language as tl

from llama_fast.kernels.common import INTERPRETED, dot, places_of, start_next, wait
from llama_fast.kernels.linear import _cos_sin, _finish, _live, _residuals, _rows, _scales, _vector_tile

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
# Two 16-bit values of a word $2 at the places that the nibble $3 names, zeros elsewhere: $0 columns 0 and 1 of four, $1 columns 2
# and 3. The tables hold, for each pair of places, the lower and the upper byte of the permutation that puts the values there.
PLACED_PAIRS: tl.constexpr = tl.constexpr(
    "{ .reg .b32 a, b;"
    " prmt.b32 a, 0x44101010, 0x00004444, $3; prmt.b32 b, 0x10444432, 0x00004410, $3; prmt.b32 a, a, b, 0x0040;"
    " prmt.b32 $0, $2, 0, a;"
    " prmt.b32 a, 0x32443244, 0x00001044, $3; prmt.b32 b, 0x44324444, 0x00003232, $3; prmt.b32 a, a, b, 0x0040;"
    " prmt.b32 $1, $2, 0, a; }"
)


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
def _of_word(word, group, FP16: tl.constexpr, SLICES: tl.constexpr):
    """The scale of one group, `group` of the first slice and those behind it of the others, of words [.., R, 1] of two."""
    even, odd = _pair(word, FP16)
    if SLICES:
        return tl.where((group + tl.arange(0, SLICES)[:, None, None]) % 2 == 0, even, odd)
    else:
        return tl.where(group % 2 == 0, even, odd)


@triton.jit
def _placed_pairs(values, words, SLICES: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Two values of each four columns [.., R, C / 2], words of their places [.., R, C / 32] -> columns 0 and 1 of each four, and
    columns 2 and 3: each [.., R, C / 2]."""
    BATCH: tl.constexpr = SLICES if SLICES else 1
    eight = tl.reshape(words, [BATCH, R, C // 32, 1]) >> (4 * tl.arange(0, 8))[None, None, None, :]
    id = tl.reshape(eight, [BATCH, R, C // 4])
    of_lower, of_upper = tl.split(tl.reshape(values, [BATCH, R, C // 4, 2]))
    if INTERPRETED or values.dtype == tl.float32:
        lower, upper = places_of(id & 7)
        zeros = tl.zeros_like(of_lower)
        even = (
            tl.where(lower == 0, of_lower, zeros),
            tl.where(lower == 2, of_lower, tl.where(upper == 2, of_upper, zeros)),
        )
        odd = (
            tl.where(lower == 1, of_lower, tl.where(upper == 1, of_upper, zeros)),
            tl.where(upper == 3, of_upper, zeros),
        )
        first, last = tl.join(even[0], odd[0]), tl.join(even[1], odd[1])
        return tl.reshape(first, values.shape), tl.reshape(last, values.shape)
    else:
        # Words of two values are made here, and parted again: which elements a packed assembly statement is given together
        # depends on the layout that the compiler chose, and need not be neighbours.
        lower, upper = of_lower.to(tl.int16, bitcast=True), of_upper.to(tl.int16, bitcast=True)
        word = (upper.to(tl.int32) << 16) | (lower.to(tl.int32) & 0xFFFF)
        first, last = tl.inline_asm_elementwise(
            PLACED_PAIRS, "=&r,=&r,r,r", [word, id], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
        return _two_of_word(first, values.shape, values.dtype), _two_of_word(last, values.shape, values.dtype)


@triton.jit
def _two_of_word(word, shape: tl.constexpr, kind: tl.constexpr):
    """The lower and the upper half of each word [..], as neighbours of the last axis of a tensor of this shape."""
    lower, upper = word.to(tl.int16).to(kind, bitcast=True), (word >> 16).to(tl.int16).to(kind, bitcast=True)
    return tl.reshape(tl.join(lower, upper), shape)


@triton.jit
def _halves(values, SLICES: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """[.., R, W] -> its first W / 2 columns and its last."""
    if SLICES:
        return tl.split(tl.permute(tl.reshape(values, [SLICES, R, 2, W // 2]), [0, 1, 3, 2]))
    else:
        return tl.split(tl.permute(tl.reshape(values, [R, 2, W // 2]), [0, 2, 1]))


@triton.jit
def _by_groups(values, SLICES: tl.constexpr, R: tl.constexpr, W: tl.constexpr, GROUPS: tl.constexpr):
    """[.., R, W] -> a tuple of 1, 2, 4 or 8 tensors [.., R, W / GROUPS], side by side."""
    if GROUPS == 1:
        return (values,)
    elif GROUPS == 2:
        return _halves(values, SLICES, R, W)
    elif GROUPS == 4:
        first, last = _halves(values, SLICES, R, W)
        return _halves(first, SLICES, R, W // 2) + _halves(last, SLICES, R, W // 2)
    else:
        first, last = _halves(values, SLICES, R, W)
        return _by_groups(first, SLICES, R, W // 2, 4) + _by_groups(last, SLICES, R, W // 2, 4)


@triton.jit
def _piece_halves(piece, SLICES: tl.constexpr, W: tl.constexpr, MP: tl.constexpr):
    """[SLICES, W, MP] -> its first W / 2 rows and its last."""
    return tl.split(tl.permute(tl.reshape(piece, [SLICES, 2, W // 2, MP]), [0, 2, 3, 1]))


@triton.jit
def _pieces_by_groups(piece, SLICES: tl.constexpr, W: tl.constexpr, MP: tl.constexpr, GROUPS: tl.constexpr):
    if GROUPS == 1:
        return (piece,)
    elif GROUPS == 2:
        return _piece_halves(piece, SLICES, W, MP)
    else:
        first, last = _piece_halves(piece, SLICES, W, MP)
        return _piece_halves(first, SLICES, W // 2, MP) + _piece_halves(last, SLICES, W // 2, MP)


@triton.jit
def _swapped(bytes, R: tl.constexpr, W: tl.constexpr):
    """Of each 16 columns of [R, W] the twos in the order 0, 2, 4, 6, 1, 3, 5, 7.

    A thread of a warp group's product wants columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of its operand in registers. In this order
    they are four bytes side by side in memory, which it loads as they are, as one word.
    """
    return tl.reshape(tl.permute(tl.reshape(bytes, [R, W // 16, 4, 2, 2]), [0, 1, 3, 2, 4]), [R, W])


@triton.jit
def _columns(first, WIDTH: tl.constexpr, SLICES: tl.constexpr, STRIDE: tl.constexpr):
    """WIDTH columns from `first` on, [WIDTH]; or of each slice, STRIDE apart, [SLICES, WIDTH]."""
    if SLICES:
        return first + tl.arange(0, SLICES)[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]
    else:
        return first + tl.arange(0, WIDTH)


@triton.jit
def _at(part, rows, live, col, W: tl.constexpr, SLICES: tl.constexpr, CHECK: tl.constexpr):
    """part[rows, col] of a part with W columns: [SLICES, R, C] or [R, C]; zeros outside."""
    if SLICES:
        at = part + rows.to(tl.int64)[None, :, None] * W + col[:, None, :]
        if CHECK:
            return tl.load(at, mask=live[None, :, None] & (col < W)[:, None, :], other=0.0)
        else:
            return tl.load(at)
    else:
        at = part + rows.to(tl.int64)[:, None] * W + col[None, :]
        if CHECK:
            return tl.load(at, mask=live[:, None] & (col < W)[None, :], other=0.0)
        else:
            return tl.load(at)


@triton.jit
def _of_slice(
    part, rows, live, first, K: tl.constexpr, EACH: tl.constexpr, STRIDE: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Of a part with a number for EACH columns, those of a slice's column `first`: [SLICES, R, 1] or [R, 1]; zeros outside."""
    if SLICES:
        at = (first + tl.arange(0, SLICES) * STRIDE) // EACH
        pointers = part + rows.to(tl.int64)[None, :] * (K // EACH) + at[:, None]
        return tl.load(pointers, mask=live[None, :] & (at < K // EACH)[:, None], other=0)[:, :, None]
    else:
        at = first // EACH
        return tl.load(part + rows.to(tl.int64) * (K // EACH) + at, mask=live & (at < K // EACH), other=0)[:, None]


@triton.jit
def _piece(
    x, PIECE: tl.constexpr, P: tl.constexpr, first, WIDTH: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    K: tl.constexpr, SLICES: tl.constexpr, STRIDE: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """One piece of the activations at WIDTH of the matrix's columns from `first` on: [SLICES, WIDTH / P, MP] or [WIDTH / P, MP]."""
    m = tl.arange(0, MP)
    W: tl.constexpr = K // P
    col = _columns(first // P, WIDTH // P, SLICES, STRIDE // P)
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
    weight, places, group_scale, zero, rows, live, first, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
    SLICES: tl.constexpr, LOADS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, PAIRS: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """All that is stored of LOADS loads from column `first` on: tuples of values, of scales (or words of two) or places, of zeros."""
    C: tl.constexpr = BK // SLICES if SLICES else BK
    STRIDE: tl.constexpr = LOADS * C
    P: tl.constexpr = 1 if KIND == "fp8" else 2
    GROUPS: tl.constexpr = max(1, C // G)
    values, others, zeros = (), (), ()
    if PAIRS:
        WORDS: tl.constexpr = max(1, LOADS * GROUPS // 2)
        if WORDS == 1:
            others = (_of_slice(group_scale, rows, live, first, K, 2 * G, STRIDE, SLICES),)
        else:
            col = _columns(first // (2 * G), WORDS, SLICES, STRIDE // (2 * G))
            others = _by_groups(_at(group_scale, rows, live, col, K // (2 * G), SLICES, CHECK), SLICES, R, WORDS, WORDS)
    for i in tl.static_range(LOADS):
        at = first + i * C
        values = values + (
            _at(weight, rows, live, _columns(at // P, C // P, SLICES, STRIDE // P), K // P, SLICES, CHECK),
        )
        if KIND == "int4" or KIND == "fp8":
            for j in tl.static_range(GROUPS):
                of = at + j * G
                if ZERO:
                    zeros = zeros + (_of_slice(zero, rows, live, of, K, G, STRIDE, SLICES),)
                if not PAIRS:
                    others = others + (_of_slice(group_scale, rows, live, of, K, G, STRIDE, SLICES),)
        else:
            words = _columns(at // 32, C // 32, SLICES, STRIDE // 32)
            others = others + (_at(places, rows, live, words, K // 32, SLICES, CHECK),)
    return values, others, zeros


@triton.jit
def _dense(values, lowest, kind: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr):
    """The dense tiles of a group: of int4 two, of fp8 one."""
    if KIND == "fp8":
        return (values.to(tl.float32).to(kind),)
    else:
        lower, upper = _nibbles(values, kind, ZERO)
        if ZERO:
            lowest = lowest.to(tl.float32).to(kind)
            lower, upper = _less(lower, lowest), _less(upper, lowest)
        return lower, upper


@triton.jit
def _times(
    stored, x, first, acc, M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
    SLICES: tl.constexpr, LOADS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, PAIRS: tl.constexpr, FP16: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """acc + what is stored of LOADS loads from column `first` on, times the activations there."""
    kind = x.dtype.element_ty
    C: tl.constexpr = BK // SLICES if SLICES else BK
    STRIDE: tl.constexpr = LOADS * C
    P: tl.constexpr = 1 if KIND == "fp8" else 2
    GROUPS: tl.constexpr = max(1, C // G)
    values, others, zeros = stored
    for i in tl.static_range(LOADS):
        at = first + i * C
        if KIND == "int4" or KIND == "fp8":
            if KIND == "int4" and not SLICES:
                of_groups = _by_groups(_swapped(values[i], R, C // P), SLICES, R, C // P, GROUPS)
            else:
                of_groups = _by_groups(values[i], SLICES, R, C // P, GROUPS)
            if SLICES and GROUPS > 1:
                of_pieces = ()
                for p in tl.static_range(P):
                    whole = _piece(x, p, P, at, C, M, MP, K, SLICES, STRIDE, CHECK)
                    of_pieces = of_pieces + _pieces_by_groups(whole, SLICES, C // P, MP, GROUPS)
            for j in tl.static_range(GROUPS):
                tiles = _dense(of_groups[j], zeros[i * GROUPS + j] if ZERO else 0, kind, KIND, ZERO)
                total = tl.zeros([SLICES, R, MP], tl.float32) if SLICES else tl.zeros([R, MP], tl.float32)
                for p in tl.static_range(P):
                    if SLICES and GROUPS > 1:
                        total = dot(tiles[p], of_pieces[p * GROUPS + j], total)
                    else:
                        piece = _piece(x, p, P, at + j * G, C // GROUPS, M, MP, K, SLICES, STRIDE, CHECK)
                        total = dot(tiles[p], piece, total)
                if PAIRS and LOADS * GROUPS == 1:
                    acc += total * _of_word(others[0], first // G, FP16, SLICES)
                elif PAIRS:
                    acc += total * _pair(others[(i * GROUPS + j) // 2], FP16)[(i * GROUPS + j) % 2]
                else:
                    acc += total * others[i * GROUPS + j].to(tl.float32)
        else:
            numbers = values[i] if KIND == "sparse" else values[i].to(tl.float32)
            tiles = _placed_pairs(numbers.to(kind), others[i], SLICES, R, C)
            for p in tl.static_range(P):
                acc = dot(tiles[p], _piece(x, p, P, at, C, M, MP, K, SLICES, STRIDE, CHECK), acc)
    return acc


@triton.jit
def _sum_of_splits(acc_RM, part, arrived, block, split, R: tl.constexpr, MP: tl.constexpr, SPLITS: tl.constexpr):
    """(whether this program is the last of its block's, then the sum of all their products [R, MP], in the order of the splits).

    part [blocks, SPLITS, R, MP], arrived [blocks]: zeros, and again when all programs have ended.
    """
    at = tl.arange(0, R)[:, None] * MP + tl.arange(0, MP)[None, :]
    first = part + block.to(tl.int64) * (SPLITS * R * MP)
    tl.store(first + split * (R * MP) + at, acc_RM)
    tl.debug_barrier()  # every thread's products are written before one thread says so
    last = tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        tl.store(arrived + block, 0)  # ready for the next launch
        acc_RM = tl.zeros([R, MP], tl.float32)
        for i in tl.static_range(SPLITS):
            acc_RM += tl.load(first + i * (R * MP) + at, cache_modifier=".cg")
    return last, acc_RM


@triton.jit
def _several_rows(
    part, arrived, x, weight, places, group_scale, zero, scale, residual, out, start, cos, sin, k_cache, v_cache, slots,
    KIND: tl.constexpr, G: tl.constexpr, ZERO: tl.constexpr, PAIRS: tl.constexpr, FP16: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    SLICES: tl.constexpr, LOADS: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    T: tl.constexpr, SCALED: tl.constexpr, EPILOGUE: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """M activation rows, in pieces, times what is stored. KIND "int4": bytes [N, K / 2], and "fp8": numbers [N, K], with a scale for
    each G columns; "sparse", "sparse_int8": values [N, K / 2] and words of places [N, K / 32].

    A slice has BK / SLICES columns of a load (SLICES 0: all BK, by a warp group), of 1, 2 or 4 groups, or of a part of one. LOADS: in
    a step of the loop. AHEAD: steps that are loaded into registers before the wait, and used last. PAIRS: scales are read in words
    of two (FP16, or bf16): what is smaller than a word cannot be copied into shared memory while the step before is worked on.
    SPLITS: programs of a block, grid (blocks, SPLITS), each with its share of the columns; the last to end adds up, see
    `_sum_of_splits`. With more than one nothing is loaded ahead.
    """
    STEP: tl.constexpr = LOADS * BK
    SHARE: tl.constexpr = (K + SPLITS * STEP - 1) // (SPLITS * STEP) * STEP
    CHECK: tl.constexpr = (N % R != 0) or (K % STEP != 0)
    block = tl.program_id(0)
    start_next(PDL)
    rows = _rows(block, N, R, EPILOGUE)
    live = _live(rows, N, EPILOGUE, block * (R // 2))
    scales = _scales(scale, rows, live, SCALED)
    ahead = ()
    for i in tl.static_range(AHEAD):
        ahead = ahead + (
            _stored_at(weight, places, group_scale, zero, rows, live, i * STEP, K, R, BK, G, SLICES, LOADS, KIND, ZERO,
                       PAIRS, CHECK),
        )  # fmt: skip
    wait(PDL)
    residuals = _residuals(residual, rows, live, N, M, MP, EPILOGUE)
    cos_sin = _cos_sin(start, cos, sin, block, R, M, MP, T, EPILOGUE, H, HKV, HD)
    acc = tl.zeros([SLICES, R, MP], tl.float32) if SLICES else tl.zeros([R, MP], tl.float32)
    if SPLITS == 1:
        begin, end = AHEAD * STEP, K
    else:
        begin = tl.program_id(1) * SHARE
        end = tl.minimum(begin + SHARE, K)
    for first in tl.range(begin, end, STEP, num_stages=STAGES):
        stored = _stored_at(weight, places, group_scale, zero, rows, live, first, K, R, BK, G, SLICES, LOADS, KIND, ZERO,
                            PAIRS, CHECK)  # fmt: skip
        acc = _times(stored, x, first, acc, M, MP, K, R, BK, G, SLICES, LOADS, KIND, ZERO, PAIRS, FP16, CHECK)
    for i in tl.static_range(AHEAD):
        acc = _times(ahead[i], x, i * STEP, acc, M, MP, K, R, BK, G, SLICES, LOADS, KIND, ZERO, PAIRS, FP16, CHECK)
    acc_RM = tl.sum(acc, 0) if SLICES else acc
    if SPLITS == 1:
        _finish(acc_RM, rows, live, block, scales, residuals, cos_sin, out, k_cache, v_cache, slots,
                M, MP, N, R, T, EPILOGUE, SCALED, H, HKV, HD)  # fmt: skip
    else:
        last, sum_RM = _sum_of_splits(acc_RM, part, arrived, block, tl.program_id(1), R, MP, SPLITS)
        if last:
            _finish(sum_RM, rows, live, block, scales, residuals, cos_sin, out, k_cache, v_cache, slots,
                    M, MP, N, R, T, EPILOGUE, SCALED, H, HKV, HD)  # fmt: skip


@triton.jit
def _in_pieces(
    x, gain, out, eps, M, K: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, RUN: tl.constexpr, P: tl.constexpr,
    SWAPPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (M,): rows of x [M, K], behind an RMS norm if NORM, in P pieces [P, M, K / P]: of each P x RUN columns each has RUN.
    SWAPPED: 16 columns of a piece stand as `_swapped` orders them."""
    start_next(PDL)
    row = tl.program_id(0)
    gains = _vector_tile(gain, 0, K, BK).to(tl.float32) if NORM else 1.0
    wait(PDL)
    value = _vector_tile(x + row * K, 0, K, BK).to(tl.float32)
    if NORM:
        value *= tl.rsqrt(tl.sum(value * value, 0) / K + eps) * gains
    col = tl.arange(0, BK)
    place = col // (P * RUN) * RUN + col % RUN
    if SWAPPED:
        place = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    at = out + ((col // RUN) % P * M + row) * (K // P) + place
    tl.store(at, value.to(out.dtype.element_ty), mask=col < K)

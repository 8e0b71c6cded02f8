"""Stored weights as dense ones, a stretch of rows at a time, for the matrix products of many rows; and activations to go with them.

Weights with scales of groups become fp16. Of int4 a nibble less the middle has 3 bits and a sign, a bf16 scale has 8 bits, and the row's power of two is
taken off; so nothing is rounded but what is 2^-10 of the row's largest and less, there below 2^-24 of that. With zero points a
bit may be lost, of a fp16's 11; of fp8, whose numbers have 4 bits and a scale 8, one at most. Sparse values keep their type's
numbers.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

import triton
import triton.language as tl

from llama_fast.kernels.common import places_of


@triton.jit
def _power_of_two(x):
    """The power of two at or below positive float32 numbers."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _widen(
    weight, places, group_scale, zero, out, powers, first,
    KIND: tl.constexpr, ZERO: tl.constexpr, K: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, K / BK): row `first` + program 0 of a weight as `narrow._narrow` reads it, to row program 0 of out [rows, K]; KIND "rows":
    numbers of another type. "int4" and "fp8", whose groups have scales, divide a row by its power of two, which goes to powers [N]."""
    row = first + tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BK + tl.arange(0, BK)
    live = col < K
    if KIND == "fp8":
        groups = tl.arange(0, BG)
        of_row = tl.load(group_scale + row * (K // G) + groups, mask=groups < K // G, other=0).to(tl.float32)
        power = 512 * _power_of_two(tl.maximum(tl.max(tl.abs(of_row), 0), 1e-30))  # weights under 2, as below
        scale = tl.load(group_scale + row * (K // G) + col // G, mask=live, other=0).to(tl.float32) / power
        value = tl.load(weight + row * K + col, mask=live, other=0.0).to(tl.float32) * scale
        if tl.program_id(1) == 0:
            tl.store(powers + row, power)
    elif KIND == "int4":
        at_word = tl.program_id(1) * (BK // 8) + tl.arange(0, BK // 8)
        words = tl.load(weight + row * (K // 8) + at_word, mask=at_word < K // 8, other=0)
        j = tl.arange(0, 8)  # of eight columns: byte j % 4, its lower half for the first four
        nibbles = (words[:, None] >> (8 * (j % 4) + j // 4 * 4)[None, :]) & 15
        groups = tl.arange(0, BG)
        of_row = tl.load(group_scale + row * (K // G) + groups, mask=groups < K // G, other=0).to(tl.float32)
        power = 16 * _power_of_two(tl.maximum(tl.max(tl.abs(of_row), 0), 1e-30))  # weights under 2: no sum leaves fp16
        at_group = row * (K // G) + at_word // (G // 8)
        scale = tl.load(group_scale + at_group, mask=at_word < K // 8, other=0).to(tl.float32) / power
        lowest = tl.load(zero + at_group, mask=at_word < K // 8, other=0).to(tl.int32)[:, None] if ZERO else 8
        value = tl.reshape((nibbles - lowest).to(tl.float32) * scale[:, None], [BK])
        if tl.program_id(1) == 0:
            tl.store(powers + row, power)
    elif KIND == "rows":
        value = tl.load(weight + row * K + col, mask=live, other=0.0).to(tl.float32)
    else:
        id = tl.load(places + row * (K // 32) + col // 32, mask=live, other=0) >> (4 * (col // 4 % 8)) & 7
        at = weight + row * (K // 2) + col // 4 * 2
        lower, upper = tl.load(at, mask=live, other=0), tl.load(at + 1, mask=live, other=0)
        of_lower, of_upper = places_of(id)
        here = col % 4
        value = tl.where(here == of_lower, lower, tl.where(here == of_upper, upper, 0)).to(tl.float32)
    tl.store(out + tl.program_id(0).to(tl.int64) * K + col, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def _halve(x, out, powers, K: tl.constexpr, BK: tl.constexpr):
    """Grid (M,): rows of x over their powers of two, which no fp16 number then leaves; powers [M]."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BK)
    value = tl.load(x + row * K + cols, mask=cols < K, other=0).to(tl.float32)
    power = _power_of_two(tl.maximum(tl.max(tl.abs(value), 0), 1e-30))
    tl.store(out + row * K + cols, (value / power).to(out.dtype.element_ty), mask=cols < K)
    tl.store(powers + row, power)


@triton.jit
def _add_scaled(
    x, product, columns, rows, N: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Grid (M, N / BN): x += product, its columns and its rows times their factors."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    live = n < N
    value = tl.load(product + m * N + n, mask=live, other=0).to(tl.float32)
    if COLUMNS:
        value *= tl.load(columns + n, mask=live, other=0).to(tl.float32)
    if ROWS:
        value *= tl.load(rows + m)
    value += tl.load(x + m * N + n, mask=live, other=0).to(tl.float32)
    tl.store(x + m * N + n, value.to(x.dtype.element_ty), mask=live)

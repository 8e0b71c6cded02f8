"""From logits to a law to a token, a row to a program: what `sampling` writes as some sixteen kernels of PyTorch, in two."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

import triton
import triton.language as tl


@triton.jit
def _ordered(bits):
    """The bits of a float32 as an int32 that is larger where the float is; its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _least_of_largest(x, K: tl.constexpr):
    """A bound that the K largest of a vector of float32, and those equal to the least of them, reach: found bit by bit, by counting."""
    # int64, so that no candidate overflows; the least int32 is where the search begins
    key = _ordered(x.to(tl.int32, bitcast=True))
    found = tl.full([], -2147483648, tl.int64)
    step = tl.full([], 2147483648, tl.int64)
    count = K + 1
    while (step > 0) & (count != K):
        count = tl.sum((key >= (found + step).to(tl.int32)).to(tl.int32), 0)
        found = tl.where(count >= K, found + step, found)
        step = step // 2
    return _ordered(found.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _law(
    logits, temperature, min_p, out, V: tl.constexpr, BV: tl.constexpr, TOP_K: tl.constexpr, FLOORED: tl.constexpr
):
    """Grid (M,): softmax of logits / temperature, of the TOP_K largest alone (0: of all), of tokens not below min_p of the likeliest."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BV)
    x = tl.load(logits + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    x = tl.div_rn(x, tl.load(temperature))
    if TOP_K:
        x = tl.where(x >= _least_of_largest(x, TOP_K), x, float("-inf"))
    p = tl.exp(x - tl.max(x, 0))
    p = p / tl.sum(p, 0)
    if FLOORED:
        p = tl.where(p >= tl.load(min_p) * tl.max(p, 0), p, 0.0)
        p = p / tl.sum(p, 0)
    tl.store(out + row * V + v, p, mask=v < V)


@triton.jit
def _draw(p, uniform, out, V: tl.constexpr, BV: tl.constexpr, E: tl.constexpr):
    """Grid (M,): where the cumulative sum, in float64, passes uniform times the total. First among stretches of E tokens, then in one."""
    row = tl.program_id(0).to(tl.int64)
    stretch = tl.arange(0, BV // E)
    e = tl.arange(0, E)
    at = stretch[:, None] * E + e[None, :]
    law = tl.load(p + row * V + at, mask=at < V, other=0)
    ends = tl.cumsum(tl.sum(law.to(tl.float64), 1), 0)
    passed = tl.load(uniform + row) * tl.max(ends, 0)
    last = tl.max(tl.max(tl.where(law > 0, at, 0), 1), 0)
    here = tl.minimum(tl.sum((ends <= passed).to(tl.int32), 0), last // E)
    inside = tl.load(p + row * V + here * E + e, mask=here * E + e < V, other=0)
    sums = tl.sum(tl.where(stretch == here - 1, ends, 0.0), 0) + tl.cumsum(inside.to(tl.float64), 0)
    token = here * E + tl.sum((sums <= passed).to(tl.int32), 0)
    # Rounding alone can pass the whole stretch; never a token of probability 0.
    tl.store(out + row, tl.minimum(token, here * E + tl.max(tl.where(inside > 0, e, 0), 0)).to(tl.int64))

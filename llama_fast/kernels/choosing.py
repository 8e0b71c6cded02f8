"""From logits to a distribution to a token, a row to a program: what `sampling` writes as some sixteen kernels of PyTorch, in two."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

import triton
import triton.language as tl


@triton.jit
def _ordered(bits):
    """The bits of a float32 as an int32 that is larger where the float is; its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _bound_of_largest(x, K):
    """A bound that the K largest of a vector of float32 reach, and those equal to the least of them: found bit by bit, by counting."""
    key = _ordered(tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True))  # one zero, as for comparisons
    # int64, so that no candidate overflows; the least int32 is where the search begins
    found = tl.full([], -2147483648, tl.int64)
    step = tl.full([], 2147483648, tl.int64)
    count = K + 1
    while (step > 0) & (count != K):
        count = tl.sum((key >= (found + step).to(tl.int32)).to(tl.int32), 0)
        found = tl.where(count >= K, found + step, found)
        step = step // 2
    return _ordered(found.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _distribution(
    logits, temperature, top_k, min_p, out,
    V: tl.constexpr, BV: tl.constexpr, EACH: tl.constexpr, CUT: tl.constexpr, FLOORED: tl.constexpr,
):  # fmt: skip
    """Grid (M,): softmax of logits / temperature, of the top_k largest alone (0: of all), of tokens not below min_p of the likeliest.

    EACH logits belong to one row of settings. Temperature 0 gives all weight to the first of the largest.
    """
    row = tl.program_id(0).to(tl.int64)
    of = row // EACH
    v = tl.arange(0, BV)
    x = tl.load(logits + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    warmth = tl.load(temperature + of)
    if warmth == 0:
        first = tl.min(tl.where(x == tl.max(x, 0), v, BV), 0)
        tl.store(out + row * V + v, tl.where(x == x, (v == first).to(tl.float32), x), mask=v < V)
    else:
        x = tl.div_rn(x, warmth)
        if CUT:
            k = tl.load(top_k + of).to(tl.int32)
            if (k > 0) & (k < V):
                x = tl.where(
                    (x >= _bound_of_largest(x, k)) | (x != x), x, float("-inf")
                )  # what is no number stays seen
        p = tl.exp(x - tl.max(x, 0))
        p = p / tl.sum(p, 0)
        if FLOORED:
            least = tl.load(min_p + of)
            if least > 0:
                p = tl.where(p >= least * tl.max(p, 0), p, 0.0)
                p = p / tl.sum(p, 0)
        tl.store(out + row * V + v, p, mask=v < V)


@triton.jit
def _draw(p, uniform, out, V: tl.constexpr, BV: tl.constexpr, E: tl.constexpr):
    """Grid (M,): the first token at which the cumulative sum, in float64, passes uniform times the total, and its own p is not 0.

    First among stretches of E tokens, then within one. Where rounding lets no sum pass, the last that has any weight.
    """
    row = tl.program_id(0).to(tl.int64)
    stretch = tl.arange(0, BV // E)
    e = tl.arange(0, E)
    at = stretch[:, None] * E + e[None, :]
    mass = tl.sum(tl.load(p + row * V + at, mask=at < V, other=0).to(tl.float64), 1)
    ends = tl.cumsum(mass, 0)
    passed = tl.load(uniform + row) * tl.max(ends, 0)
    last = tl.max(tl.where(mass > 0, stretch, 0), 0)
    here = tl.minimum(tl.min(tl.where((mass > 0) & (ends > passed), stretch, BV), 0), last)
    inside = tl.load(p + row * V + here * E + e, mask=here * E + e < V, other=0).to(tl.float64)
    sums = tl.sum(tl.where(stretch == here - 1, ends, 0.0), 0) + tl.cumsum(inside, 0)
    token = tl.min(tl.where((inside > 0) & (sums > passed), e, E), 0)
    token = tl.minimum(token, tl.max(tl.where(inside > 0, e, 0), 0))
    tl.store(out + row, (here * E + token).to(tl.int64))

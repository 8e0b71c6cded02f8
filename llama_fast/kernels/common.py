"""What every kernel shares: programmatic dependent launch, int8 to float32.

A kernel started with programmatic dependent launch (PDL) may begin before the one ahead of it has ended. Until `wait` it may
touch only what no earlier kernel of the step writes: weights, gains, tables. Every kernel waits, in some program at least: so one
that has waited knows all kernels before it to have ended, and not the last alone.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def start_next(PDL: tl.constexpr):
    """Let the next kernel's programs take free room from here on (its weights then travel while this kernel ends)."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until the kernel ahead has ended and its writes are visible."""
    if PDL:
        gdc_wait()


# int8 to float32 without conversion instructions, four weights w of a 32-bit word at a time: u = w + 128 by flipping the top bits,
# then each byte into a float's mantissa. "exact": u under 2^23, which is subtracted again. "offset": 1 + u / 2^15, left so.
EXACT: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t; xor.b32 t, $4, 0x80808080;"
    " prmt.b32 $0, t, 0x4B000000, 0x7540; prmt.b32 $1, t, 0x4B000000, 0x7541;"
    " prmt.b32 $2, t, 0x4B000000, 0x7542; prmt.b32 $3, t, 0x4B000000, 0x7543;"
    " sub.f32 $0, $0, 0f4B000080; sub.f32 $1, $1, 0f4B000080;"
    " sub.f32 $2, $2, 0f4B000080; sub.f32 $3, $3, 0f4B000080; }"
)
OFFSET: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t; xor.b32 t, $4, 0x80808080;"
    " prmt.b32 $0, t, 0x3F800000, 0x7604; prmt.b32 $1, t, 0x3F800000, 0x7614;"
    " prmt.b32 $2, t, 0x3F800000, 0x7624; prmt.b32 $3, t, 0x3F800000, 0x7634; }"
)


@triton.jit
def to_float32(weight, CONVERT: tl.constexpr):
    """bf16, float32 or int8 to float32; int8 by CONVERT "plain", "exact", or "offset" (which gives 1 + (w + 128) / 2^15)."""
    if CONVERT == "plain":
        return weight.to(tl.float32)
    else:
        asm: tl.constexpr = EXACT if CONVERT == "exact" else OFFSET
        return tl.inline_asm_elementwise(asm, "=f,=f,=f,=f,r", [weight], dtype=tl.float32, is_pure=True, pack=4)


@triton.jit
def dot(a, b, acc):
    """acc + a b, float32 sums. The interpreter multiplies bf16 by its bit patterns, so there both become float32 (exactly)."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def places_of(id):
    """Where the two values of four columns stand, by the number of their pair: 0 to 5 for (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)."""
    return tl.where(id < 3, 0, tl.where(id < 5, 1, 2)), tl.where(id == 0, 1, tl.where((id & 5) == 1, 2, 3))

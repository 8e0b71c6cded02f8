"""The two ends of a decode step: token ids to embeddings, and logits to the id of the largest (the lowest id on ties)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# (functions under triton.jit are compiled from their source; Triton ships no types)

import triton
import triton.language as tl

from llama_fast.kernels.common import start_next, wait


@triton.jit
def _embed(tokens, table, out, D: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr):
    """Grid (M, D / BD). Waits before it lets the next kernel start: so whatever ran ahead of a step is over for all of it."""
    wait(PDL)
    start_next(PDL)
    row = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    token = tl.load(tokens + row).to(tl.int64)
    tl.store(out + row * D + d, tl.load(table + token * D + d, mask=d < D), mask=d < D)


@triton.jit
def _largest(value_a, id_a, value_b, id_b):
    """The larger value; of equal values the lower id."""
    a_wins = (value_a > value_b) | ((value_a == value_b) & (id_a < id_b))
    return tl.where(a_wins, value_a, value_b), tl.where(a_wins, id_a, id_b)


@triton.jit
def _argmax(
    logits, out, part_value, part_id, arrived, position,
    VOCAB: tl.constexpr, BV: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr, ADVANCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (M, SPLITS): each program one stretch of the vocabulary; the last to finish compares the winners."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    start_next(PDL)
    wait(PDL)
    v = split * BV + tl.arange(0, BV)
    value = tl.load(logits + row * VOCAB + v, mask=v < VOCAB, other=float("-inf")).to(tl.float32)
    best, best_id = tl.reduce((value, v), 0, _largest)
    tl.store(part_value + row * SPLITS + split, best)
    tl.store(part_id + row * SPLITS + split, best_id)
    tl.debug_barrier()
    before = tl.atomic_add(arrived + row, 1, sem="acq_rel", scope="gpu")
    if before == SPLITS - 1:
        s = tl.arange(0, SP)
        winners = tl.load(part_value + row * SPLITS + s, mask=s < SPLITS, other=float("-inf"), cache_modifier=".cg")
        ids = tl.load(part_id + row * SPLITS + s, mask=s < SPLITS, other=VOCAB, cache_modifier=".cg")
        _, overall_id = tl.reduce((winners, ids), 0, _largest)
        tl.store(out + row, overall_id.to(tl.int64))
        tl.store(arrived + row, 0)
        if ADVANCE:
            tl.store(position + row, tl.load(position + row) + 1)

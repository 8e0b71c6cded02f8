"""Keys and values in eight bits: whether a cache holds what it promises, and attention reads that.

All else about such a plan is asked of the same plan with keys in the arithmetic's type: rounding to integers is a step function,
and one number on its edge would move logits by far more than all roundings. Here it is asked by parts: what is kept, against what
the subject showed of its keys and values; attention, against what is kept; and what the loss costs on a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from llama_fast.engine.runner import Runner
from llama_fast.plan import Plan
from oracle.questions.localise import Stage
from oracle.statistics.compare import Check, Verdict, empty
from oracle.statistics.drift import LEAST_POSITIONS, SURE, Tally, measure
from oracle.subjects.fast import FastSubject
from oracle.subjects.subject import Trace

LARGEST = 127
MOST_KLD, MOST_CHANGED = 5e-3, 0.04
"""What eight bits of keys and values may cost on a text, against the same model with all bits."""


def without_bits(plan: Plan) -> Plan:
    """The plan with keys and values in the type of the arithmetic."""
    cache: Any = plan.cache
    return replace(plan, cache=replace(cache, bits=None)) if getattr(cache, "bits", None) else plan


def judge_kept(traces: Sequence[Trace], head_dim: int, unit: float) -> Verdict:
    """Each number that is kept lies within half a step of the one that was shown; a step is 1/127 of its vector's largest.

    Allowed are the roundings besides: of the step, and of the product to the arithmetic's type, of unit roundoff `unit`.
    """
    worst, where, count = 0.0, "", 0
    for row, trace in enumerate(traces):
        for name in (name for name in trace if name.endswith("_kept")):
            shown = trace[name.replace("k_kept", "k_rope").replace("v_kept", "v")]
            share = share_of_step(trace[name], shown, head_dim, unit)
            count += share.numel()
            if not float(share.max()) <= worst:
                worst, where = float(share.max()), f"row {row}, {name}, position {int(share.amax(-1).argmax())}"
    if not count:
        return empty("kept", "the subject shows no keys that it keeps")
    return Verdict((Check("kept", worst if worst == worst else float("inf"), 1.0, where, count),))


def share_of_step(kept_TN: Tensor, shown_TN: Tensor, head_dim: int, unit: float) -> Tensor:
    """The error of each kept number as a share of what is allowed, [T, heads x d]."""
    kept, shown = (each.double().unflatten(-1, (-1, head_dim)) for each in (kept_TN, shown_TN))
    step = shown.abs().amax(-1, keepdim=True) / LARGEST
    allowed = step / 2 * (1 + 1e-5) + unit * shown.abs() * 1.1 + 1e-25
    share: Tensor = ((kept - shown).abs() / allowed).flatten(-2)
    return share


def kept_stages(stages: Iterable[Stage]) -> list[Stage]:
    """Of the stages of such a subject, those of attention: the others are asked of the same plan without bits."""
    return [stage for stage in stages if stage.name.endswith(".attention")]


def judge_loss(narrow: Runner, exact: Runner, rows: Sequence[Sequence[int]]) -> Verdict:
    """What a text's predictions lose by eight bits: their divergence, and how many likeliest tokens change."""
    tally = Tally.of([], [], [])
    for row in rows:
        true, ours = (FastSubject(runner).prefill_logits([row]) for runner in (exact, narrow))
        tally += Tally.of(ours, true, [row])
    drift = measure(tally)
    T = drift.positions
    if T < LEAST_POSITIONS:
        return empty("loss", f"{T} positions of text, at least {LEAST_POSITIONS} have a standard error")
    kld, top1 = drift.kld_mean, drift.top1_agreement
    changed = 1 - top1.value
    return Verdict(
        (
            Check("mean KLD", kld.value - SURE * kld.error, MOST_KLD, f"measured {kld}", T),
            Check("top-1 tokens changed", changed - SURE * top1.error, MOST_CHANGED, f"measured {changed:.3g}", T),
        )
    )  # fmt: skip

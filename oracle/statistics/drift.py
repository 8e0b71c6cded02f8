"""What a lossy encoding changes in the model's predictions: a question of quality, asked beside that of wiring.

Against the original weights, on a text: the KL divergence of the next-token distributions, how often the likeliest
token is the same, and the ratio of perplexities. Errors of neighbouring positions hang together, so standard errors
come from resampling blocks of 32 positions, not single ones. Fewer than four blocks say nothing of how they scatter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oracle.statistics.compare import Check, Verdict, empty
from oracle.statistics.greedy import first_argmax

BLOCK_POSITIONS = 32
LEAST_POSITIONS = 4 * BLOCK_POSITIONS  # one block is every resample of itself: it would have no error at all
RESAMPLES = 400
QUANTILES = {"median": 0.5, "p99": 0.99, "p999": 0.999}
NORMAL_95 = 1.96  # standard errors to either side that hold 95% of a normal law
SURE = 2.0  # standard errors: a budget counts as exceeded where the whole interval lies beyond it


@dataclass(frozen=True)
class Estimate:
    """A statistic, its standard error, and the interval that holds 95% of what resampling gives: NaN for a short text."""

    value: float
    error: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        if math.isnan(self.error):
            return f"{self.value:.3g} [no interval]"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Drift:
    """How far a subject's predictions are from the original model's, over `positions` of text."""

    positions: int
    kld_mean: Estimate
    kld_median: Estimate
    kld_p99: Estimate
    kld_p999: Estimate
    top1_agreement: Estimate
    perplexity_ratio: Estimate


@dataclass(frozen=True)
class DriftBudget:
    """What an encoding may cost. `weight_step`: largest error of a weight as a share of the largest in its row.
    `drops_two_of_four`: of each four columns the two smallest weights may be zero instead."""

    kld_mean: float
    top1_agreement: float
    top1_behind_plain: float
    perplexity_ratio: float
    weight_step: float
    drops_two_of_four: bool = False


WIDENED = (1 + 2**-7) * 1.001
"""A step whose scale is rounded up to a bf16 number, in the arithmetic of float32."""

BUDGETS: Mapping[str, DriftBudget] = {
    # half of 1/127 of a row's largest weight, widened by the rounding of a bf16 scale (at most 2^-7 upwards)
    "int8": DriftBudget(1e-2, 0.94, 0.03, 1.03, 0.5 / 127 * WIDENED),
    # between 256 and 448, which stands for a row's largest weight, e4m3 numbers are 32 apart
    "fp8": DriftBudget(0.06, 0.82, 0.15, 1.1, 16 / 448 * WIDENED),
    "fp8-g128": DriftBudget(0.06, 0.82, 0.15, 1.1, 16 / 448 * WIDENED),
    # half of 1/7 of a group's largest weight; with a zero point, half of 1/15 of a range that is at most twice as long
    "int4": DriftBudget(1.0, 0.45, 0.55, 2.2, 0.5 / 7 * WIDENED),
    "int4-g64": DriftBudget(1.0, 0.45, 0.55, 2.2, 0.5 / 7 * WIDENED),
    "int4-g32": DriftBudget(0.8, 0.5, 0.5, 1.8, 0.5 / 7 * WIDENED),
    "int4-zero": DriftBudget(0.8, 0.5, 0.5, 1.8, 1 / 15 * WIDENED),
    "int4-g64-zero": DriftBudget(0.8, 0.5, 0.5, 1.8, 1 / 15 * WIDENED),
    "int4-g32-zero": DriftBudget(0.6, 0.55, 0.45, 1.6, 1 / 15 * WIDENED),
    # half of the weights are dropped, however large they are beside the rest of their row; without a text a small model then
    # predicts next to nothing (docs/quality.md), and little is left to keep to
    "sparse24": DriftBudget(6.5, 0.0, 1.0, 400, 2**-8 * 1.001, drops_two_of_four=True),  # the rest is rounded to bf16
    "sparse24-int8": DriftBudget(6.5, 0.0, 1.0, 400, 0.5 / 127 * WIDENED, drops_two_of_four=True),
}
SIZED = re.compile(r"(?P<kind>int8|int4|fp8)-g(?P<group>\d+)(?P<zero>-zero)?")


def budget_of(name: str) -> DriftBudget | None:
    """The budget of an encoding, by its name. Of one whose name has sizes in it, as "int4-g96", that of the next larger group
    that has one: smaller groups cost less. None for "dense", and for what is coarser than all that is written here.
    """
    if name in BUDGETS:
        return BUDGETS[name]
    sized = SIZED.fullmatch(name)
    if sized is None:
        return None
    group, zero = int(sized["group"]), sized["zero"] or ""
    if sized["kind"] == "int8":  # with a zero point, half of 1/255 of a range that is at most twice as long
        return replace(BUDGETS["int8"], weight_step=1 / 255 * WIDENED) if zero else BUDGETS["int8"]
    if sized["kind"] == "fp8":
        return BUDGETS["fp8"]
    at_most = {32: f"int4-g32{zero}", 64: f"int4-g64{zero}", 128: f"int4{zero}"}
    return next((BUDGETS[of] for size, of in at_most.items() if group <= size), None)


@dataclass(frozen=True)
class Tally:
    """Per-position numbers of one text, from which every statistic is a mean or a quantile."""

    kld: Tensor  # [T]
    same: Tensor  # [T], 1 where the likeliest token is the same
    excess: Tensor  # [T], how much more surprised the subject is by the actual next token; NaN at a row's end

    @classmethod
    def of(cls, subject: Sequence[Tensor], truth: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> Tally:
        """Rows of logits [T_b, V] and the tokens they were computed from."""
        kld, same, excess = [], [], []
        for s_TV, t_TV, tokens in zip(subject, truth, rows, strict=True):
            for begin in range(0, len(tokens), BLOCK_POSITIONS):  # in pieces: float64 logs of 128k terms are large
                part = slice(begin, begin + BLOCK_POSITIONS)
                log_q = s_TV[part].to(t_TV.device).double().log_softmax(-1)
                log_p = t_TV[part].double().log_softmax(-1)
                kld.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
                same.append((first_argmax(log_p) == first_argmax(log_q)).double().cpu())
                following = torch.tensor(list(tokens[begin + 1 : begin + len(log_p) + 1]), device=t_TV.device)
                surprise = (log_p - log_q)[: len(following)].gather(-1, following[:, None])[:, 0].cpu()
                excess.append(torch.cat([surprise, surprise.new_full((len(log_p) - len(following),), math.nan)]))
        return cls(torch.cat(kld), torch.cat(same), torch.cat(excess)) if kld else cls(*[torch.zeros(0)] * 3)

    def histogram(self) -> list[int]:
        """How many positions have a divergence of 10^-12 to 10^2, in 28 half decades; what is outside goes to the ends."""
        half_decades = ((self.kld.clamp(min=1e-12).log10() + 12) * 2).long().clamp(0, 27)
        return torch.bincount(half_decades, minlength=28).tolist()  # type: ignore[no-any-return]

    def __add__(self, other: Tally) -> Tally:
        pairs = ((self.kld, other.kld), (self.same, other.same), (self.excess, other.excess))
        return Tally(*(torch.cat(pair) for pair in pairs))


def measure(tally: Tally) -> Drift:
    """The statistics and their standard errors by a block bootstrap with a fixed seed: same numbers in, same out.

    Below `LEAST_POSITIONS` there are values only.
    """
    T = len(tally.kld)
    if not T:
        return Drift(0, *[Estimate(math.nan, math.nan)] * 6)
    blocks = max(1, T // BLOCK_POSITIONS)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(blocks, (RESAMPLES, blocks), generator=generator)
    inside = torch.arange(T // blocks)
    index_RT = (picks[:, :, None] * (T // blocks) + inside).flatten(1)

    def estimate(values_T: Tensor, statistic: str) -> Estimate:
        def of(v: Tensor) -> Tensor:
            if statistic in QUANTILES:
                return v.quantile(QUANTILES[statistic], dim=-1)
            return v.nanmean(-1).exp() if statistic == "ratio" else v.nanmean(-1)

        if T < LEAST_POSITIONS:
            return Estimate(float(of(values_T)), math.nan)
        again_R = of(values_T[index_RT])
        low, high = again_R.quantile(0.025), again_R.quantile(0.975)
        return Estimate(float(of(values_T)), float(again_R.std()), float(low), float(high))

    return Drift(
        T,
        estimate(tally.kld, "mean"),
        estimate(tally.kld, "median"),
        estimate(tally.kld, "p99"),
        estimate(tally.kld, "p999"),
        estimate(tally.same, "mean"),
        estimate(tally.excess, "ratio"),
    )


def judge_drift(drift: Drift, plain: Drift, budget: DriftBudget) -> Verdict:
    """Whether a lossy subject stays within its encoding's budget; `plain` is what bfloat16 alone costs on the text.

    An estimate is beyond its budget where it is so by more than two standard errors: a short text cannot convict, and one
    below `LEAST_POSITIONS` is EMPTY.
    """
    if drift.positions < LEAST_POSITIONS:
        return empty("drift", f"{drift.positions} positions of text, at least {LEAST_POSITIONS} have a standard error")

    def at_most(name: str, found: Estimate, limit: float) -> Check:
        return Check(name, found.value - SURE * found.error, limit, f"measured {found}", drift.positions)

    top1, other = drift.top1_agreement, plain.top1_agreement
    lost = Estimate(1 - top1.value, top1.error, 1 - top1.high, 1 - top1.low)
    apart, error = other.value - top1.value, math.hypot(top1.error, other.error)
    behind = Estimate(apart, error, apart - NORMAL_95 * error, apart + NORMAL_95 * error)
    return Verdict(
        (
            at_most("mean KLD", drift.kld_mean, budget.kld_mean),
            at_most("top-1 tokens changed", lost, 1 - budget.top1_agreement),
            at_most("top-1 tokens changed beyond plain bf16", behind, budget.top1_behind_plain),
            at_most("perplexity ratio", drift.perplexity_ratio, budget.perplexity_ratio),
        )
    )

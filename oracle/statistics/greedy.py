"""Greedy tokens: the argmax of the subject's own logits exactly, of the truth's up to ties. Pure functions on tensors.

A token that is not truth's argmax is a tie if truth's margin between the two is at most twice the largest error that
the yardstick's budget allows at that position. The subject's own error has no say: a rule that widened with it could
not fail. One reference pass over prompt + the subject's tokens judges every position, also those after a tie.

Ties are capped. Errors of the yardstick's size make a tie at a position with the probability that independent normal
errors lift some rival over the best; the sum over positions is the expected number, ties are taken as Poisson, and the
cap is the count that an innocent subject exceeds once in a million.

Shapes: n new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oracle.statistics.budget import Factors
from oracle.statistics.budget import factors as factors_of
from oracle.statistics.compare import (
    ROUNDING_MAX,
    ROUNDING_RMS,
    Check,
    Verdict,
    centred_rows,
    empty,
    misfit,
    orders_of,
    peak,
)

FALSE_ALARM = 1e-6


@dataclass(frozen=True)
class Continuation:
    """One row's tokens, and logits [n, V]: those they were chosen from, truth's and yardstick's of the same positions.

    `logits` is None where the subject shows none.
    """

    tokens: Sequence[int]
    logits: Tensor | None
    truth: Tensor
    yardstick: Tensor


def compare_greedy(runs: Sequence[Continuation], unit: float, factors: Factors | None = None) -> Verdict:
    """The three checks: own argmax, margin of every disagreement, number of ties."""
    orders = orders_of([run.yardstick for run in runs])
    factors = factors_of("logits", unit, orders) if factors is None else factors
    total = sum(len(run.tokens) for run in runs)
    if not total:
        return empty("tokens", "nothing was compared")
    for row, run in enumerate(runs):
        wrong = _unfit(run)
        if wrong:
            return Verdict((Check("tokens", 1.0, 0.0, f"row {row}: {wrong}"),))
    shown = [(row, run) for row, run in enumerate(runs) if run.tokens]
    checks = []
    if any(run.logits is not None for _, run in shown):
        checks.append(_own_argmax(shown, total))
    return Verdict((*checks, _margin(shown, unit, factors, total), _ties(shown, unit, factors, total)))


def not_as_asked(said: Sequence[Sequence[int]], rows: int, n: int) -> str:
    """How tokens are not the `rows` of `n` each that were asked, or "": ([[5], [7, 8]], 2, 2) -> "row 0: 1 tokens, asked 2"."""
    if len(said) != rows:
        return f"{len(said)} rows, asked {rows}"
    return next((f"row {b}: {len(tokens)} tokens, asked {n}" for b, tokens in enumerate(said) if len(tokens) != n), "")


def _unfit(run: Continuation) -> str:
    V = run.truth.shape[-1]
    if len(run.tokens) != len(run.truth):
        return f"{len(run.tokens)} tokens for {len(run.truth)} positions"
    outside = [token for token in run.tokens if not 0 <= token < V]
    if outside:
        return f"{outside[0]} is outside the vocabulary of {V}"
    one_order = run.yardstick[0] if run.yardstick.dim() == 3 else run.yardstick
    compared = [one_order] if run.logits is None else [one_order, run.logits]
    return misfit(compared, [run.truth] * len(compared))


def _own_argmax(runs: Sequence[tuple[int, Continuation]], total: int) -> Check:
    """Exactly: equal logits are all the largest. (Compiled code may choose before it rounds to bfloat16.)"""
    count, where = 0, ""
    for row, run in runs:
        if run.logits is not None:
            behind_nV = run.logits.amax(-1, keepdim=True) - run.logits
            wrong_n = _of_chosen(run, behind_nV) != 0
            count += int(wrong_n.sum())
            where = where or (f"row {row}, token {int(wrong_n.int().argmax())}" if wrong_n.any() else "")
    return Check("tokens not the argmax of their own logits", count, 0, where, total)


def _margin(runs: Sequence[tuple[int, Continuation]], unit: float, factors: Factors, total: int) -> Check:
    worst = Check("margin of a disagreement", 0.0, 1.0, "", total)
    for row, run in runs:
        truth_nV, error_nV, behind_nV = _in_float64(run)
        largest_n = error_nV.abs().amax(-1).maximum(truth_nV.abs().amax(-1) * (ROUNDING_MAX * unit))
        _, factor = factors.of_position(total)
        behind_n = _of_chosen(run, behind_nV)
        share, at = peak(torch.where(behind_n > 0, behind_n / (2 * factor * largest_n), 0.0))
        if share > worst.measured:
            place = f"row {row}, token {at}: {run.tokens[at]} where truth has {int(truth_nV[at].argmax())}"
            place += f", behind by {float(behind_n[at]):.3g}"
            worst = Check(worst.name, share, worst.budget, place, total)
    return worst


def _ties(runs: Sequence[tuple[int, Continuation]], unit: float, factors: Factors, total: int) -> Check:
    count, expected = 0, 0.0
    for _, run in runs:
        truth_nV, error_nV, behind_nV = _in_float64(run)
        rounding_n = truth_nV.square().mean(-1).sqrt() * (ROUNDING_RMS * unit)
        rms_n = error_nV.square().mean(-1).sqrt().maximum(rounding_n)
        count += int((_of_chosen(run, behind_nV) > 0).sum())
        expected += float(chance_of_tie(behind_nV, rms_n * factors.of_average(factors.window_positions)).sum())
    cap = poisson_quantile(expected, FALSE_ALARM)
    return Check("ties", count, cap, f"{expected:.2g} expected at most", total)


def _in_float64(run: Continuation) -> tuple[Tensor, Tensor, Tensor]:
    """Truth's logits, the yardstick's errors and how far every token is behind truth's best, all [n, V]."""
    truth_nV = run.truth.double()
    error_nV = centred_rows(run.yardstick.to(truth_nV.device).double() - truth_nV)
    if error_nV.dim() == 3:  # several orders: the RMS of their errors stands for all
        error_nV = error_nV.square().mean(0).sqrt()
    return truth_nV, error_nV, truth_nV.amax(-1, keepdim=True) - truth_nV


def _of_chosen(run: Continuation, behind_nV: Tensor) -> Tensor:
    chosen_n1 = torch.tensor(list(run.tokens), device=behind_nV.device)[:, None]
    return behind_nV.gather(-1, chosen_n1)[:, 0]


def first_argmax(logits_nV: Tensor) -> Tensor:
    """The lowest id among the largest logits, which `torch.argmax` does not promise: [1, 7, 7] -> 1."""
    V = logits_nV.shape[-1]
    ids_V = torch.arange(V, device=logits_nV.device)
    return torch.where(logits_nV == logits_nV.amax(-1, keepdim=True), ids_V, V).amin(-1).clamp(max=V - 1)


def chance_of_tie(behind_nV: Tensor, rms_n: Tensor) -> Tensor:
    """The chance [n] that independent normal errors of this RMS lift a rival over the best, summed over rivals."""
    spread_n1 = (rms_n * math.sqrt(2)).clamp(min=1e-300)[:, None]
    chance_nV: Tensor = torch.special.erfc(behind_nV / spread_n1 / math.sqrt(2)) / 2
    chance_nV = chance_nV.scatter(-1, behind_nV.argmin(-1, keepdim=True), 0.0)  # the best is no rival of itself
    return chance_nV.sum(-1).clamp(max=1.0)


def poisson_quantile(mean: float, tail: float) -> int:
    """The smallest c with P(Poisson(mean) > c) <= tail: (0.0, 1e-6) -> 0, (1.0, 1e-6) -> 9."""
    most = int(mean + 8 * math.sqrt(mean) + 20)  # far beyond any tail that is asked for
    probability = math.exp(-mean)
    below = probability
    for count in range(most):
        if 1 - below <= tail:
            return count
        probability *= mean / (count + 1)
        below += probability
    return most

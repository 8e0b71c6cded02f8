"""Logits judged by what their own number type costs. Pure functions on tensors; nothing here knows a Llama.

Three sets of logits of the same tokens come in: the subject's, the truth's (float64) and a yardstick's (a plain
implementation in the subject's own type, best in several orders of summation). What the type costs is the yardstick's
error against the truth; a subject agrees if its error, divided by the yardstick's, stays below a factor, in four
statistics: the RMS over the whole run, over any window of 32 positions, over the vocabulary at any position, and the
largest error at any position. The fewer numbers a statistic averages, the wider two innocent roundings scatter.
The factors follow from a stated false-alarm rate (budget.py); for 225 positions of logits they are

                                                            bfloat16   float32
    whole           RMS over all positions                  1.32       3.0
    window          RMS over any 32 positions of a row      1.54       3.37
    position RMS    RMS over the vocabulary, any position   3.87       8.28
    position max    largest error, any position             6.83       10.2

In float32 the order of summation is all of the error, which differs from kernel to kernel (a sum in 16 lanes errs 1.8
times less than one in a row).

Logits are compared up to one constant per position, which neither softmax nor sampling sees (so log-probabilities may
be judged as well). It must go: a trained model's rounding error is mostly such a shift of all logits together. On
SmolLM2-135M in bfloat16 it is 88% of the squared error, and being a single number a position, its ratio of two innocent
runs reached 10.

A ratio needs a denominator that cannot vanish by luck, so the yardstick's error has two floors. Nobody can do better
than round the result once: that costs 0.39 units of the truth's RMS, and up to half a unit of its largest value (`unit`
is the type's unit roundoff). And at a single position (or in a window cut short) the yardstick may happen to be nearly
right, above all where one large number carries the error: there its error counts as at least its relative error over
the whole run, times the truth's size at that position. A yardstick that is *far* from the truth proves nothing either:
beyond a relative error of 1/4 the verdict is EMPTY, not AGREE.

In a type as narrow as bfloat16 a trained model is chaotic at a few positions (the first ones of a text above all, where
attention finds its sink): SmolLM2-135M has one in a thousand whose error is 28 times the usual, in one order of
summation and not in the next. So in narrow types one position in 64 (at least one) is set aside from the statistics:
those where the yardstick errs most, and as many where the subject exceeds it most. They still must resemble the truth:
an error of 0.7 of its RMS fails (unrelated logits err by 1.4). In float32 nothing is set aside, and a fault of a single
position shows there, or in its stage.

Parts of a block are compared by another measure: each number's error is divided by its own size plus the median size
at its position. A trained model has single activations a thousand times the others, and without this the rounding of
one number would be all that is compared. What cancels to a small number there keeps a large error, so a position's
largest error gets a wide factor.

Shapes: T positions, V vocabulary, O orders of the yardstick.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from oracle.statistics.budget import Factors
from oracle.statistics.budget import factors as factors_of

ROUNDING_RMS = 0.39  # RMS of one rounding / (unit x RMS of the rounded): 1/sqrt(3) over a binade's RMS of 1.47
ROUNDING_MAX = 0.5  # least bound of one rounding / (unit x value), just below a power of two
FEW = 8  # positions too few to set one aside
TINY = 1e-290  # what a denominator is at least
UNLIKE = 0.7  # relative error of logits that no longer resemble the truth
UNINFORMATIVE = 0.25  # relative error of a yardstick that no longer measures anything


class Unjudgeable(ValueError):
    """What was given cannot be judged, whatever the subject says: no verdict, but a refusal."""


class Outcome(str, Enum):
    """What a verdict says. Only AGREE is a pass."""

    AGREE = "AGREE"
    DIFFER = "DIFFER"
    EMPTY = "EMPTY"


@dataclass(frozen=True)
class Check:
    """One comparison: passed if `measured` <= `budget` (NaN fails). `compared` = 0 says that nothing was there."""

    name: str
    measured: float
    budget: float
    where: str = ""
    compared: int = 1

    @property
    def ok(self) -> bool:
        return self.compared > 0 and self.measured <= self.budget


@dataclass(frozen=True)
class Verdict:
    """Checks and what follows from them. One failed check is DIFFER; no checks, or one that is empty, is EMPTY."""

    checks: tuple[Check, ...] = ()

    @property
    def outcome(self) -> Outcome:
        if any(check.compared and not check.ok for check in self.checks):
            return Outcome.DIFFER
        if not self.checks or any(not check.compared for check in self.checks):
            return Outcome.EMPTY
        return Outcome.AGREE

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.ok)

    @property
    def closest(self) -> Check | None:
        """The check that stands nearest to its budget, or furthest beyond."""
        return max(self.checks, key=_use_of_budget, default=None)

    def __add__(self, other: Verdict) -> Verdict:
        """Both sets of checks. An empty part stays visible: it carries its own empty check."""
        return Verdict(self.checks + other.checks)

    def named(self, prefix: str) -> Verdict:
        """The same checks as "prefix: name"."""
        return Verdict(tuple(replace(check, name=f"{prefix}: {check.name}") for check in self.checks))

    def __str__(self) -> str:
        told = self.failures[0] if self.failures else self.closest
        if told is None:
            return f"{self.outcome.value} (no checks)"
        if not told.compared:
            return f"{self.outcome.value} ({told.name}: {told.where or 'nothing was compared'})"
        place = f" at {told.where}" if told.where else ""
        return f"{self.outcome.value} ({told.name} {told.measured:.3g} of {told.budget:.3g}{place})"


def empty(name: str, why: str) -> Verdict:
    """The verdict of a comparison that could not be made."""
    return Verdict((Check(name, 0.0, 0.0, why, compared=0),))


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: bfloat16 -> 2**-8."""
    return torch.finfo(dtype).eps / 2


def compare_logits(
    subject: Sequence[Tensor],
    truth: Sequence[Tensor],
    yardstick: Sequence[Tensor],
    unit: float,
    starts: Sequence[int] | None = None,
    factors: Factors | None = None,
) -> Verdict:
    """The four statistics over rows of logits [T_b, V], up to a constant per position.

    `unit` is `unit_roundoff` of the subject's type; `starts` are the rows' first positions. A yardstick in several
    orders is [O, T_b, V]: its squared error is the mean over them. Truth and yardstick must be finite; a subject that is
    not DIFFERs at the position named. Rows or positions missing, or another vocabulary, are DIFFER too.
    """
    factors = factors_of("logits", unit, orders_of(yardstick)) if factors is None else factors
    return _compare(subject, truth, yardstick, unit, starts, factors, centred=True)


def compare_stage(
    subject: Sequence[Tensor],
    truth: Sequence[Tensor],
    yardstick: Sequence[Tensor],
    unit: float,
    factors: Factors | None = None,
    kind: str = "product",
) -> Verdict:
    """The same for rows [T_b, features] of a part of a block, each error relative to the size of its number.

    `kind`: product, attention, rope, gate or pointwise, which scatter unlike.
    """
    factors = factors_of(kind, unit, orders_of(yardstick)) if factors is None else factors
    wrong = misfit(subject, truth)
    if wrong:
        return Verdict((Check("shape", 1.0, 0.0, wrong),))
    return _compare(*_scaled(subject, truth, yardstick), unit, None, factors, centred=False)


def ratios(
    subject: Sequence[Tensor], truth: Sequence[Tensor], yardstick: Sequence[Tensor], unit: float, stage: bool = False
) -> dict[str, Tensor]:
    """The ratios behind a verdict, for who measures their spread: whole [1], window [W], position_rms and _max [T].

    Nothing is set aside in them but what a verdict sets aside too.
    """
    factors = factors_of("product" if stage else "logits", unit, orders_of(yardstick))
    three = _scaled(subject, truth, yardstick) if stage else (subject, truth, yardstick)
    rows = [
        _Errors.of(s, t, y, unit, row, 0, not stage)
        for row, (s, t, y) in enumerate(zip(*three, strict=True))
        if t.numel()
    ]
    positions = sum(len(row.square) for row in rows)
    rows, _ = _set_aside(rows, math.ceil(factors.set_aside * positions) if positions >= FEW else 0)
    measured = _Ratios.of(rows, factors)
    counted = [row.counted for row in rows]
    return {
        "whole": torch.tensor([measured.whole]),
        "window": torch.tensor([check.measured for check in measured.windows]),
        "position_rms": torch.cat([r[c] for r, c in zip(measured.rms, counted)]),
        "position_max": torch.cat([r[c] for r, c in zip(measured.largest, counted)]),
    }


@dataclass(frozen=True)
class Curve:
    """One row's relative error (RMS over the vocabulary / the truth's RMS) at every position, and what was allowed."""

    subject: list[float]
    yardstick: list[float]
    budget: list[float]


def curves(subject: Sequence[Tensor], truth: Sequence[Tensor], yardstick: Sequence[Tensor], unit: float) -> list[Curve]:
    """The pictures of a comparison of logits; empty where it could not be made."""
    if misfit(subject, truth) or not truth:
        return []
    three = zip(subject, truth, yardstick, strict=True)
    rows = [_Errors.of(s, t, y, unit, row, 0, True) for row, (s, t, y) in enumerate(three) if t.numel()]
    factors = factors_of("logits", unit, orders_of(yardstick))
    factor, _ = factors.of_position(sum(len(row.square) for row in rows))
    blunt = _Ratios.of(rows, factors).blunt
    found = []
    for row in rows:
        size = row.truth_square.clamp(min=TINY)
        own, plain = (row.square / size).sqrt(), (row.yardstick_floored / size).sqrt()
        allowed = factor * (row.typical_square(blunt) / size).sqrt()
        found.append(Curve(own.tolist(), plain.tolist(), allowed.tolist()))
    return found


def orders_of(yardstick: Sequence[Tensor]) -> int:
    """In how many orders a yardstick was run: rows are [T, V] or [O, T, V]."""
    return yardstick[0].shape[0] if yardstick and yardstick[0].dim() == 3 else 1


def _scaled(
    subject: Sequence[Tensor], truth: Sequence[Tensor], yardstick: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Stages divided by the sizes of their numbers."""
    own: list[Tensor] = []
    true: list[Tensor] = []
    plain: list[Tensor] = []
    for s_TF, t_TF, y_TF in zip(subject, truth, yardstick, strict=True):
        t_TF = t_TF.double()
        scale_TF = _size(t_TF) if t_TF.numel() else t_TF
        for rows, value in ((own, s_TF), (true, t_TF), (plain, y_TF)):
            rows.append(value.to(t_TF.device).double() / scale_TF)
    return own, true, plain


def _size(truth_TF: Tensor) -> Tensor:
    """Each number's own size plus the median size at its position (where most are zero, a thousandth of their RMS)."""
    size_TF = truth_TF.abs()
    least_T1 = truth_TF.square().mean(-1, keepdim=True).sqrt() * 1e-3
    return size_TF + size_TF.median(-1, keepdim=True).values.maximum(least_T1).clamp(min=1e-30)


def _compare(
    subject: Sequence[Tensor],
    truth: Sequence[Tensor],
    yardstick: Sequence[Tensor],
    unit: float,
    starts: Sequence[int] | None,
    factors: Factors,
    centred: bool,
) -> Verdict:
    starts = [0] * len(truth) if starts is None else starts
    wrong = misfit(subject, truth)
    if wrong:
        return Verdict((Check("shape", 1.0, 0.0, wrong),))
    rows = [
        _Errors.of(s, t, y, unit, row, start, centred)
        for row, (s, t, y, start) in enumerate(zip(subject, truth, yardstick, starts, strict=True))
        if t.numel()
    ]
    if not rows:
        return empty("positions", "nothing was compared")
    finite = _finite_check(rows)
    if not finite.ok:
        return Verdict((finite,))
    positions = finite.compared
    rows, aside = _set_aside(rows, math.ceil(factors.set_aside * positions) if positions >= FEW else 0)
    checks = [finite, *([aside] if aside else [])]
    measured = _Ratios.of(rows, factors)
    if not measured.blunt <= UNINFORMATIVE:
        return empty(
            "yardstick", f"a relative error of {measured.blunt:.2g} in the plain implementation: no conclusion"
        )
    rms, largest = factors.of_position(positions)
    return Verdict(
        (
            *checks,
            Check("whole", measured.whole, factors.of_average(positions), "", positions),
            replace(max(measured.windows, key=_use_of_budget), compared=positions),
            _worst("position RMS", rows, measured.rms, rms, positions),
            _worst("position max", rows, measured.largest, largest, positions),
        )
    )


@dataclass(frozen=True)
class _Ratios:
    """The subject's errors as ratios to the yardstick's; `blunt` is the yardstick's own relative error."""

    blunt: float
    whole: float
    windows: list[Check]
    rms: list[Tensor]  # [T] of each row
    largest: list[Tensor]

    @classmethod
    def of(cls, rows: Sequence[_Errors], factors: Factors) -> _Ratios:
        sums = zip(*((r.square, r.yardstick_square, r.yardstick_floored, r.truth_square) for r in rows))
        square, yardstick, floored, truth = (_total(part) for part in sums)
        blunt = math.sqrt(yardstick / max(truth, 1e-300))
        if not blunt <= UNINFORMATIVE:
            return cls(blunt, math.nan, [], [], [])
        return cls(
            blunt,
            math.sqrt(square / floored),
            [window for row in rows for window in row.windows(factors, blunt, sum(len(r.square) for r in rows))],
            [(row.square / row.typical_square(blunt)).sqrt() for row in rows],
            [row.largest / row.typical_largest(blunt) for row in rows],
        )


@dataclass(frozen=True)
class _Errors:
    """One row's squared and largest errors per position; positions set aside are all zeros but for the yardstick's."""

    square: Tensor  # [T], summed over the vocabulary, as all squares here
    yardstick_square: Tensor
    yardstick_floored: Tensor  # at least one rounding
    truth_square: Tensor
    largest: Tensor  # [T]
    yardstick_largest: Tensor  # at least one rounding
    truth_largest: Tensor
    row: int
    start: int
    counted: Tensor  # [T], False where set aside

    @classmethod
    def of(
        cls,
        subject_TV: Tensor,
        truth_TV: Tensor,
        yardstick_TV: Tensor,
        unit: float,
        row: int,
        start: int,
        centred: bool,
    ) -> _Errors:
        truth_TV = truth_TV.double()
        own_TV = subject_TV.to(truth_TV.device).double() - truth_TV
        other_TV = yardstick_TV.to(truth_TV.device).double() - truth_TV
        rounding_square = truth_TV.square().sum(-1) * (ROUNDING_RMS * unit) ** 2
        rounding_largest = truth_TV.abs().amax(-1) * (ROUNDING_MAX * unit)
        if centred:
            own_TV, other_TV, truth_TV = centred_rows(own_TV), centred_rows(other_TV), centred_rows(truth_TV)
        other_square, other_largest = other_TV.square().sum(-1), other_TV.abs().amax(-1)
        if other_TV.dim() == 3:  # several orders: one number that stands for all
            other_square, other_largest = other_square.mean(0), other_largest.square().mean(0).sqrt()
        return cls(
            square=own_TV.square().sum(-1).cpu(),
            yardstick_square=other_square.cpu(),
            yardstick_floored=other_square.maximum(rounding_square).clamp(min=TINY).cpu(),
            truth_square=truth_TV.square().sum(-1).cpu(),
            largest=own_TV.abs().amax(-1).cpu(),
            yardstick_largest=other_largest.maximum(rounding_largest).clamp(min=TINY).cpu(),
            truth_largest=truth_TV.abs().amax(-1).cpu(),
            row=row,
            start=start,
            counted=torch.ones(len(truth_TV), dtype=torch.bool),
        )

    def without(self, aside_T: Tensor) -> _Errors:
        """The row with these positions set aside: they add nothing to any sum or maximum."""

        def counted(values_T: Tensor) -> Tensor:
            return torch.where(aside_T, 0.0, values_T)

        return replace(
            self,
            square=counted(self.square),
            yardstick_square=counted(self.yardstick_square),
            yardstick_floored=counted(self.yardstick_floored),
            truth_square=counted(self.truth_square),
            largest=counted(self.largest),
            counted=self.counted & ~aside_T,
        )

    def typical_square(self, relative: float) -> Tensor:
        """The yardstick's squared error per position, at least the run's relative error x the truth's size there."""
        return self.yardstick_floored.maximum(self.truth_square * relative**2).clamp(min=TINY)

    def typical_largest(self, relative: float) -> Tensor:
        return self.yardstick_largest.maximum(self.truth_largest * relative)

    def windows(self, factors: Factors, relative: float, positions: int) -> list[Check]:
        """Every window of the row; the last one reaches back so as to be full, a shorter row is one shorter window."""
        T, length = len(self.square), factors.window_positions
        among = max(1, positions // length)
        allowed = self.yardstick_floored if length <= T else self.typical_square(relative)
        begins = sorted({*range(0, max(T - length, 0) + 1, length), max(T - length, 0)})
        checks = []
        for begin in begins:
            end = min(begin + length, T)
            counted = int(self.counted[begin:end].sum())
            if counted:
                ratio = math.sqrt(float(self.square[begin:end].sum() / allowed[begin:end].sum()))
                place = f"row {self.row}, positions {self.start + begin}-{self.start + end - 1}"
                checks.append(Check("window", ratio, factors.of_average(counted, among), place))
        return checks

    def at(self, index: int) -> str:
        return f"row {self.row}, position {self.start + index}"


def centred_rows(x_TV: Tensor) -> Tensor:
    """Each row less its mean."""
    return x_TV - x_TV.mean(-1, keepdim=True)


def peak(ratio_T: Tensor) -> tuple[float, int]:
    """The largest value and its index."""
    return float(ratio_T.max()), int(ratio_T.argmax())


def _worst(name: str, rows: Sequence[_Errors], ratios: Sequence[Tensor], budget: float, positions: int) -> Check:
    """The largest ratio over all positions of all rows, and where it stands."""
    peaks = [peak(ratio_T) for ratio_T in ratios]
    row = max(range(len(rows)), key=lambda index: peaks[index][0])
    return Check(name, peaks[row][0], budget, rows[row].at(peaks[row][1]), positions)


def _set_aside(rows: list[_Errors], count: int) -> tuple[list[_Errors], Check | None]:
    """Rows without the `count` positions where the yardstick errs most and as many where the subject exceeds it most.

    Both relative to the truth; with the check that the subject still resembles the truth there.
    """
    if not count:
        return rows, None
    size = torch.cat([row.truth_square for row in rows]).clamp(min=TINY)
    own, other = (torch.cat(part) for part in zip(*((row.square, row.yardstick_floored) for row in rows)))
    aside = torch.zeros(len(size), dtype=torch.bool)
    aside[(other / size).topk(count).indices] = True
    aside[((own - other) / size).masked_fill(aside, -math.inf).topk(count).indices] = True
    unlike = (own / size).sqrt().masked_fill(~aside, 0.0)
    worst, at = peak(unlike)
    lengths = [len(row.square) for row in rows]
    row = next(i for i in range(len(rows)) if at < sum(lengths[: i + 1]))
    place = rows[row].at(at - sum(lengths[:row]))
    check = Check(f"relative error of {int(aside.sum())} positions set aside", worst, UNLIKE, place, int(aside.sum()))
    return [row.without(part) for row, part in zip(rows, torch.split(aside, lengths))], check


def _finite_check(rows: Sequence[_Errors]) -> Check:
    """That the subject's numbers are numbers. Truth and yardstick are ours: there it is an error, not a verdict."""
    bad, where, positions = 0, "", 0
    for row in rows:
        if not torch.isfinite(row.truth_square).all():
            raise Unjudgeable("the float64 truth holds NaN or infinity: these weights cannot be judged")
        broken_T = ~torch.isfinite(row.square)
        bad += int(broken_T.sum())
        where = where or (row.at(int(broken_T.int().argmax())) if broken_T.any() else "")
        positions += len(row.square)
    return Check("positions with NaN or infinity", bad, 0, where, positions)


def misfit(subject: Sequence[Tensor], truth: Sequence[Tensor]) -> str:
    """How the subject's shapes differ from the truth's, in words; empty if they do not."""
    if len(subject) != len(truth):
        return f"{len(subject)} rows instead of {len(truth)}"
    for row, (own, other) in enumerate(zip(subject, truth)):
        if own.shape != other.shape:
            return f"row {row}: shape {list(own.shape)} instead of {list(other.shape)}"
    return ""


def _total(parts: Iterable[Tensor]) -> float:
    return float(sum(part.sum() for part in parts))


def _use_of_budget(check: Check) -> float:
    if not check.compared or math.isnan(check.measured):
        return math.inf
    if check.budget > 0:
        return check.measured / check.budget
    return 0.0 if check.measured <= 0 else math.inf

"""Where it differs: every part of every block, judged on the subject's own inputs.

The subject shows what each stage gave (its "trace"). The truth of a stage is the reference's float64 arithmetic of that
one stage, applied to what the subject showed of the stage's *inputs*; the yardstick is the same in the subject's type.
So an early fault does not spill into later stages, and one stage's rounding is all the noise there is: q scaled by
1.002 drowns in bfloat16 logits, but not in bfloat16 q. Every stage beyond its budget is a fault of its own, and the
first one is where to look.

Stages that a subject does not show are computed from the last ones it did: one that shows whole blocks only is judged
block by block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from oracle.statistics.budget import Factors, kind_of
from oracle.statistics.budget import factors as factors_of
from oracle.statistics.compare import Check, Outcome, Verdict, compare_logits, compare_stage, empty, orders_of
from oracle.subjects.subject import Trace


class Stages(Protocol):
    """A reference that evaluates stages one by one; adapters.RefSubject is one."""

    def stages_of_block(self, layer: int, seen: Sequence[Trace]) -> list[Trace]: ...

    def embeddings(self, rows: Sequence[Sequence[int]]) -> list[Tensor]: ...

    def stages_of_ends(self, rows: Sequence[Sequence[int]], seen: Sequence[Trace]) -> list[Trace]: ...


@dataclass(frozen=True)
class Stage:
    """One stage and its verdict; `subject` and `truth` hold each tensor's statistics in words."""

    name: str
    verdict: Verdict
    subject: str = ""
    truth: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}"


def judge_stages(
    rows: Sequence[Sequence[int]],
    traces: Sequence[Trace],
    truth: Stages,
    yardstick: Stages,
    n_layers: int,
    unit: float,
    factors: Factors | None = None,
) -> list[Stage]:
    """Every stage that the subject showed of any row, over the rows that show it, in the order of the forward pass."""
    carried_truth = [dict(trace) for trace in traces]
    carried_yardstick = [dict(trace) for trace in traces]
    for carried, reference in ((carried_truth, truth), (carried_yardstick, yardstick)):
        for trace, looked_up in zip(carried, reference.embeddings(rows), strict=True):
            trace.setdefault("embedding", looked_up)
    stages: list[Stage] = []
    shown = set().union(*traces)
    among = max(1, len(shown))
    for layer in range(n_layers):
        true = truth.stages_of_block(layer, carried_truth)
        plain = yardstick.stages_of_block(layer, carried_yardstick)
        for rows_seen, rows_given in ((carried_truth, true), (carried_yardstick, plain)):
            for seen, given in zip(rows_seen, rows_given, strict=True):
                seen.setdefault(f"layers.{layer}", given[f"layers.{layer}"])
        stages += [_stage(name, traces, true, plain, unit, factors, among) for name in true[0] if name in shown]
    ends_truth = truth.stages_of_ends(rows, carried_truth)
    ends_yardstick = yardstick.stages_of_ends(rows, carried_yardstick)
    ends = [
        _stage(name, traces, ends_truth, ends_yardstick, unit, factors, among)
        for name in ends_truth[0]
        if name in shown
    ]
    return [s for s in ends if s.name == "embedding"] + stages + [s for s in ends if s.name != "embedding"]


def _stage(
    name: str,
    traces: Sequence[Trace],
    truth: Sequence[Trace],
    yardstick: Sequence[Trace],
    unit: float,
    factors: Factors | None,
    among: int,
) -> Stage:
    """One stage's verdict; `among`: so many stages share the rate of false alarms."""
    seen, true, plain = [], [], []
    for trace, t, y in zip(traces, truth, yardstick, strict=True):
        end = None if name in trace else 0  # a row that does not show it has no positions here, and keeps its number
        true.append(t[name][:end])
        plain.append(y[name][..., :end, :])
        seen.append(trace.get(name, true[-1]))
    shown = [trace[name] for trace in traces if name in trace]
    if not all(torch.isfinite(row).all() for row in true):
        return Stage(name, empty(name, "the subject's own inputs hold NaN or infinity"))
    kind = kind_of(name)
    if factors is None:
        factors = factors_of(kind, unit, orders_of(plain), shown[0].device.type).shared_by(among)
    if name == "logits":
        verdict = compare_logits(seen, true, plain, unit, None, factors)
    else:
        verdict = compare_stage(seen, true, plain, unit, factors)
    if verdict.outcome is Outcome.AGREE:
        return Stage(name, verdict)
    return Stage(name, verdict, _statistics(shown), _statistics(true))


def _statistics(rows: Sequence[Tensor]) -> str:
    whole = torch.cat([row.flatten() for row in rows]).double()
    return f"mean {float(whole.mean()):.6g}, std {float(whole.std()):.6g}, largest {float(whole.abs().max()):.6g}"


def first_beyond(stages: Sequence[Stage]) -> Stage | None:
    """The first stage of the forward pass that is not AGREE."""
    return next((stage for stage in stages if stage.verdict.outcome is not Outcome.AGREE), None)


def summary(stages: Sequence[Stage]) -> Verdict:
    """One check per kind of stage ("q_rope"): the one nearest to its budget of all blocks, `where` naming the block."""
    kinds: dict[str, list[Check]] = {}
    for stage in stages:
        told = stage.verdict.failures[0] if stage.verdict.failures else stage.verdict.closest
        assert told is not None
        place = f"{stage.name}, {told.name}" + (f", {told.where}" if told.where else "")
        kind = "block" if stage.name.rpartition(".")[2].isdigit() else stage.name.rpartition(".")[2]
        kinds.setdefault(kind, []).append(replace(told, name=kind, where=place))
    if not kinds:
        return empty("stages", "the subject shows none")
    return Verdict(
        tuple(max(checks, key=lambda c: (not c.ok, c.measured / max(c.budget, 1e-300))) for checks in kinds.values())
    )


def layer_curve(stages: Sequence[Stage]) -> list[tuple[str, float]]:
    """Per block (and embedding, norm, logits): the largest share of its budget that any of its parts uses."""
    curve: dict[str, float] = {}
    for stage in stages:
        place = ".".join(stage.name.split(".")[:2])
        told = stage.verdict.failures[0] if stage.verdict.failures else stage.verdict.closest
        if told is not None:
            used = told.measured / told.budget if told.budget > 0 else float(told.measured > 0) * 1e6
            curve[place] = max(curve.get(place, 0.0), used)
    return list(curve.items())


def judge_rope_table(table_Td2: Tensor, angle_Td: Tensor, radius: float = 1.0) -> Verdict:
    """Cosines and sines [T, d/2, 2], both times `radius`, against float64 angles [T, d/2], at every position.

    Allowed is what float32 angles cost, in half units in the last place: 2 of the value, and of the angle, which grows with the
    position, 4 and what its frequency f has lost. As exp(-e log theta) that is 3 roundings of the exponent, log 1/f, each of
    which moves f by so many times itself; powers lose less. A bfloat16 table fails at once, a theta that is off by 0.01% within
    the first hundred positions.
    """
    if table_Td2.shape[0] == 0:
        return empty("rope table", "no positions")
    expected_Td2 = radius * torch.stack([angle_Td.cos(), angle_Td.sin()], -1)
    if table_Td2.shape != expected_Td2.shape:
        shapes = f"shape {list(table_Td2.shape)} instead of {list(expected_Td2.shape)}"
        return Verdict((Check("rope table", 1.0, 0.0, shapes),))
    exponent_d = -angle_Td[min(1, len(angle_Td) - 1)].clamp(min=1e-30, max=1.0).log()
    allowed_Td = torch.finfo(torch.float32).eps / 2 * radius * (2 + (4 + 3 * exponent_d) * angle_Td)
    share_Td = (table_Td2.double().cpu() - expected_Td2).abs().amax(-1) / allowed_Td
    share_Td = share_Td.nan_to_num(nan=float("inf"))
    worst = int(share_Td.argmax())
    place = f"position {worst // share_Td.shape[1]}, pair {worst % share_Td.shape[1]}"
    return Verdict((Check("rope table", float(share_Td.max()), 1.0, place, table_Td2.shape[0]),))


def judge_weights(
    held: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    largest_step: float,
    drops_two_of_four: bool = False,
) -> Verdict:
    """Weights as a runner computes with them against the original ones, tensor by tensor.

    `largest_step` bounds each number's error as a share of the largest in its row (0: equal bit for bit). This is
    where an encoding's own faults show: a swapped or transposed scale is wiring that both sides share. `drops_two_of_four`:
    zeros that stand for the smallest weights of each four columns are no errors, if they are two at most.
    """
    worst, where, count = 0.0, "", 0
    missing = sorted(set(original) ^ set(held))
    if missing:
        return Verdict((Check("weights", float(len(missing)), 0.0, f"not on both sides: {', '.join(missing[:5])}"),))
    for name in original:
        ours, theirs = held[name], original[name].to(held[name].device)
        if ours.shape != theirs.shape:
            return Verdict((Check("weights", 1.0, 0.0, f"{name}: shape {list(ours.shape)} for {list(theirs.shape)}"),))
        size = theirs.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
        share_of = (ours.float() - theirs.float()).abs() / size
        if drops_two_of_four and share_of.dim() == 2 and share_of.shape[1] % 4 == 0:
            share_of = share_of.masked_fill(lawfully_dropped(ours, theirs), 0.0)
        share = float(share_of.max())
        share = math.inf if math.isnan(share) else share
        count += 1
        if share > worst:
            worst, where = share, name
    return Verdict((Check("weights", worst, largest_step, where, count),))


def lawfully_dropped(ours: Tensor, theirs: Tensor) -> Tensor:
    """Which weights [out, columns] were lawfully made zero: at most two of four, and none larger than one that is kept."""
    size_OG4, zero_OG4 = theirs.float().abs().unflatten(1, (-1, 4)), (ours == 0).unflatten(1, (-1, 4))
    smallest_kept_OG1 = size_OG4.masked_fill(zero_OG4, math.inf).amin(-1, keepdim=True)
    few_OG1 = zero_OG4.sum(-1, keepdim=True) <= 2
    lawful_OG4: Tensor = zero_OG4 & few_OG1 & (size_OG4 <= smallest_kept_OG1)
    return lawful_OG4.flatten(1)

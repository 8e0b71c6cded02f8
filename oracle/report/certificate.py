"""What was judged, how, and what came out: as JSON for machines and as text for people.

Schema "llama-oracle/2" (a key is only ever added; a changed meaning takes a new number; 2 has budgets by false-alarm rate
and intervals in `drift`):

    schema, date             "llama-oracle/2"; ISO date. All else is the same for the same input.
    false_alarm_rate         of an innocent implementation, all checks together
    subject                  model, encoding, plan, device, dtype, torch
    outcome                  AGREE | DIFFER | EMPTY
    parts[]                  name, outcome, checks[]: name, measured, budget, ok, where, compared
    drift                    null or positions, {kld_mean, kld_median, kld_p99, kld_p999, top1_agreement,
                             perplexity_ratio}: {value, error, low, high} (standard error, 95% interval), for the
                             subject and for plain bf16
    first_fault              null or stage, where, measured, budget, subject, truth
    notes[]                  what could not be asked, and why
    pictures                 layers: {dtype: [[block, share of its budget used]]}, positions: {dtype: [{subject,
                             yardstick, budget}] a row}, histogram: {who: counts of KLD in half decades from 1e-12}
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from oracle.questions.localise import Stage
from oracle.questions.survival import survived
from oracle.statistics.budget import RATE
from oracle.statistics.compare import Check, Curve, Outcome, Verdict
from oracle.statistics.drift import Drift

SCHEMA = "llama-oracle/2"
STATISTICS = ("kld_mean", "kld_median", "kld_p99", "kld_p999", "top1_agreement", "perplexity_ratio")


@dataclass
class Certificate:
    """Parts in the order they were asked. The outcome is that of all checks together."""

    subject: Mapping[str, str]
    parts: dict[str, Verdict] = field(default_factory=dict)
    drift: Drift | None = None
    plain_drift: Drift | None = None
    first_fault: Stage | None = None
    notes: list[str] = field(default_factory=list)
    layers: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    positions: dict[str, list[Curve]] = field(default_factory=dict)
    histogram: dict[str, list[int]] = field(default_factory=dict)

    def ask(self, part: str, question: Callable[[], Verdict]) -> None:
        """Add a question's answer; an error inside it differs, and its place is told."""
        self.parts[part] = survived(part, question)

    @property
    def verdict(self) -> Verdict:
        """All parts' checks; a part without any stays visible as an empty one."""
        checks: tuple[Check, ...] = ()
        for name, part in self.parts.items():
            checks += part.named(name).checks or (Check(name, 0.0, 0.0, "nothing was compared", compared=0),)
        return Verdict(checks)

    @property
    def outcome(self) -> Outcome:
        return self.verdict.outcome

    def to_json(self, date: str | None = None) -> str:
        """The document; `date` defaults to today."""
        fault = self.first_fault
        told = None if fault is None else (fault.verdict.failures or (fault.verdict.closest,))[0]
        document = {
            "schema": SCHEMA,
            "date": date or datetime.date.today().isoformat(),
            "subject": dict(self.subject),
            "outcome": self.outcome.value,
            "false_alarm_rate": RATE,
            "parts": [
                {"name": name, "outcome": part.outcome.value, "checks": [_check(check) for check in part.checks]}
                for name, part in self.parts.items()
            ],
            "drift": None
            if self.drift is None
            else {"subject": _drift(self.drift), "plain_bf16": _drift(self.plain_drift)},
            "first_fault": None
            if fault is None or told is None
            else {"stage": fault.name, **_check(told), "subject": fault.subject, "truth": fault.truth},
            "notes": self.notes,
            "pictures": self.pictures(),
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    def estimates(self) -> list[tuple[str, str, str]]:
        """(statistic, the subject's, plain bf16's) in words."""
        if self.drift is None:
            return []
        plain = {} if self.plain_drift is None else _estimates(self.plain_drift)
        return [(key, str(ours), str(plain.get(key, ""))) for key, ours in _estimates(self.drift).items()]

    def pictures(self) -> dict[str, Any]:
        """What the page draws, rounded to what can be seen."""
        layers = {name: [[place, _seen(used)] for place, used in curve] for name, curve in self.layers.items()}
        positions = {
            name: [{key: [_seen(x) for x in values] for key, values in asdict(curve).items()} for curve in rows]
            for name, rows in self.positions.items()
        }
        return {"layers": layers, "positions": positions, "histogram": self.histogram}

    def to_text(self) -> str:
        """The report: one line per check, the fault's place if there is one, the outcome last."""
        lines = [f"{key:9} {value}" for key, value in self.subject.items()]
        for name, part in self.parts.items():
            lines += ["", f"{name}: {part.outcome.value}"]
            lines += [_line(check) for check in part.checks]
        if self.drift is not None:
            lines += ["", f"drift over {self.drift.positions} positions of text [95% interval], subject | plain bf16"]
            lines += [f"  {key.replace('_', ' '):42} {ours} | {plain}" for key, ours, plain in self.estimates()]
        if self.first_fault is not None:
            lines += ["", f"first fault: {self.first_fault}"]
            lines += [f"  subject: {self.first_fault.subject}", f"  truth:   {self.first_fault.truth}"]
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n".join([*lines, "", self.outcome.value]) + "\n"


def _line(check: Check) -> str:
    mark = "ok  " if check.ok else ("----" if not check.compared else "FAIL")
    place = f"  {check.where}" if check.where else ""
    return f"  {mark} {check.name:42} {check.measured:10.4g} of {check.budget:<8.4g}{place}"


def _check(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "measured": _number(check.measured),
        "budget": _number(check.budget),
        "ok": check.ok,
        "where": check.where,
        "compared": check.compared,
    }


def _drift(drift: Drift | None) -> dict[str, Any] | None:
    if drift is None:
        return None
    found = {key: {name: _number(x) for name, x in asdict(value).items()} for key, value in _estimates(drift).items()}
    return {"positions": drift.positions, **found}


def _estimates(drift: Drift) -> dict[str, Any]:
    return {key: getattr(drift, key) for key in STATISTICS}


def _seen(value: float) -> float | str:
    return float(f"{value:.3g}") if math.isfinite(value) else str(value)


def _number(value: float) -> float | str:
    """Six digits: enough to read, few enough to be the same on the next run. JSON knows no NaN: it becomes a word."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)

"""How much larger than the yardstick's error an innocent error may be: factors from a stated false-alarm rate.

Nothing here is chosen to pass. `python -m oracle.spread` runs many innocent implementations (the reference, our twin,
`transformers` with both of its attentions; each in many orders of summation) on many models, and measures every
statistic's ratio to the yardstick. What it finds is kept, in data/spread.json, as one `Tail` for each statistic:

    worst   the mean of log(ratio) in the worst implementation and order: what is systematic (a sum in one row errs more
            than one in sixteen lanes). The rate below holds for that one, and so for every other of the family.
    start   how far beyond its own mean the largest `share` of log-ratios begin,
    scale   and their mean excess over it. Beyond the start the tail is taken as exponential, which is heavier than the
            normal tail that log-ratios of averages have.

`factor(chance)` extrapolates that tail: the ratio which an innocent one exceeds with this chance. A comparison of many
positions divides its chance among them (Bonferroni), so that a longer text has no more false alarms than a short one,
and a verification divides RATE among its comparisons.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

RATE = 1e-4
"""False alarms per verification of an innocent implementation, all its comparisons together."""

ROUTES = 40
"""Comparisons of logits that share one half of RATE; the stages of all blocks share the other half."""

ORDERS = 3
"""Orders of summation that a yardstick is run in where time allows."""

NARROW = 1e-5  # a unit roundoff above this is that of bfloat16 or float16
DATA = Path(__file__).parents[1] / "data"
TABLES = {"cpu": DATA / "spread.json", "cuda": DATA / "spread-cuda.json"}
"""What was measured on which device. What a device has no tails for is judged by the CPU's."""
STATISTICS = ("whole", "window", "position_rms", "position_max")


@dataclass(frozen=True)
class Tail:
    """The upper end of a statistic's log-ratio in the worst legal order; see the top of this file."""

    worst: float
    start: float
    share: float
    scale: float

    def factor(self, chance: float) -> float:
        """The ratio exceeded with this chance: Tail(0, .1, .02, .05).factor(.02) -> exp(.1)."""
        return math.exp(self.worst + self.start + self.scale * max(0.0, math.log(self.share / chance)))


LEAST = {"whole": 1.15, "window": 1.3, "position_rms": 2.0, "position_max": 4.0}
"""No factor is below these. In bfloat16 two innocent products agree in nearly every bit, so that what scatters lies beyond
the measured part of the tail: there a number that falls to the other side of a rounding, in the next binade, errs 4 times as
much, and this is where the floors come from, not from a fit."""


@dataclass(frozen=True)
class Factors:
    """The tails of the four statistics of one comparison, and the chance of a false alarm that it may take."""

    whole: Tail
    window: Tail
    position_rms: Tail
    position_max: Tail
    rate: float = RATE / 2 / ROUTES
    window_positions: int = 32
    whole_positions: int = 225
    set_aside: float = 0.0
    """Share of the positions that may be chaotic."""

    @property
    def windows(self) -> float:
        """How many windows a whole run has."""
        return self.whole_positions / self.window_positions

    def of_average(self, positions: int, among: int = 1) -> float:
        """The factor for an RMS over so many positions, one of `among` such.

        Between a single position, a window and a whole run the logarithm is interpolated over log(positions).
        """
        chance = self.rate / len(STATISTICS) / among
        tails = {"position_rms": self.position_rms, "window": self.window, "whole": self.whole}
        single, window, whole = (math.log(max(LEAST[k], tail.factor(chance))) for k, tail in tails.items())
        # Tails are fitted apart and may cross. A run's average is beyond a factor only where one of its windows is, so it is
        # allowed no more than they are with a share of the chance each; an average of fewer positions no less than of more.
        whole = min(whole, math.log(max(LEAST["window"], self.window.factor(chance / self.windows))))
        window = max(window, whole)
        single = max(single, window)
        if positions <= self.window_positions:
            share = math.log(positions) / math.log(self.window_positions)
            return math.exp(single + (window - single) * share)
        share = math.log(positions / self.window_positions) / math.log(self.whole_positions / self.window_positions)
        return math.exp(window + (whole - window) * min(share, 1.0))

    def of_position(self, positions: int) -> tuple[float, float]:
        """The factors for the RMS and the largest error at any of so many positions."""
        chance = self.rate / len(STATISTICS) / positions
        # Again no less than an average over a window.
        rms = max(self.position_rms.factor(chance), self.window.factor(chance / self.windows))
        return max(LEAST["position_rms"], rms), max(LEAST["position_max"], self.position_max.factor(chance))

    def shared_by(self, comparisons: int) -> Factors:
        """The same where so many comparisons share the rate."""
        return replace(self, rate=self.rate / comparisons)


KINDS = {"attention": "attention", "ffn_hidden": "gate", "q_rope": "rope", "k_rope": "rope"} | dict.fromkeys(
    ("q", "k", "v", "attention_out", "ffn_out", "logits"), "product"
)


def kind_of(stage: str) -> str:
    """ "layers.3.q" -> "product"; a norm, an embedding or a residual sum is "pointwise"."""
    return KINDS.get(stage.rpartition(".")[2], "pointwise")


def factors(what: str, unit: float, orders: int = 1, device: str = "cpu") -> Factors:
    """The factors for "logits" or a kind of stage of a type with this unit roundoff, against so many orders, on a device."""
    narrow = unit > NARROW
    key = f"{what} {'narrow' if narrow else 'wide'} {'many' if orders >= ORDERS else 'one'}"
    found = tails(device).get(key) or tails("cpu")[key]
    whole, window, position_rms, position_max = (Tail(**found[name]) for name in STATISTICS)
    aside = 1 / 64 if narrow and what == "logits" else 0.0
    rate = RATE / 2 / (ROUTES if what == "logits" else 1)
    return Factors(whole, window, position_rms, position_max, rate=rate, set_aside=aside)


@cache
def tails(device: str) -> dict[str, dict[str, dict[str, float]]]:
    """The measured tails of a device's table, by comparison and statistic; none where nothing was measured."""
    table = TABLES.get(device)
    if table is None or not table.exists():
        return {}
    found: dict[str, dict[str, dict[str, float]]] = json.loads(table.read_text(encoding="utf-8"))["tails"]
    return found

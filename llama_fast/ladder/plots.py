"""The picture of a ladder: memory, bandwidth and speed of every rung, and how far each is from the memory's wall.

`python -m llama_fast.ladder.plots ladder.json ladder.png` draws it again from the file that `bench` wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_fast.ladder.bench import Ladder, RungResult, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FLOOR = "#1b2a41", "#d1495b"
SHADES = ["#6b859e", "#5b8db8", "#2a6f97", "#1b998b", "#c98c1a", "#7a5195", "#a23b72", "#6b705c"]
SIDE_BY_SIDE = 4
"""The most rungs whose three charts stand side by side; of more they stand one below another, as wide as the page."""
SMALL, LARGE = 9, 10  # points: legible where the picture is as wide as a page
TWO_LINES, ONE_LINE, GAP = 0.15, 0.075, 0.02  # of a chart's greatest value: heights of text, with the air above it


def draw(ladder: Ladder, path: Path) -> None:
    """Write `path` (PNG)."""
    picture(ladder).savefig(path, dpi=140)


def picture(ladder: Ladder) -> Figure:
    """Three bar charts with percentages of the first rung, the floors and the spread of the samples drawn in."""
    from matplotlib.figure import Figure

    rungs = ladder.rungs
    wide = len(rungs) <= SIDE_BY_SIDE
    figure = Figure(figsize=(13.0, 5.8) if wide else (12.0, 14.0), layout="constrained")
    memory, bandwidth, speed = figure.subplots(*((1, 3) if wide else (3, 1)))
    each = ", of each rank" if any(rung.ranks > 1 for rung in rungs) else ""
    bars(memory, f"Memory (GB{each})", rungs, [Bar(rung.peak_memory_gb) for rung in rungs], "{:.2f}")
    wall = ladder.read_bandwidth_gb_per_s
    read = [Bar(rung.bandwidth_gb_per_s) for rung in rungs]
    bars(bandwidth, f"Bandwidth achieved (GB/s{each})", rungs, read, "{:.1f}", wall)
    bandwidth.axhline(wall, color=FLOOR, linewidth=1.6, label=f"measured read bandwidth, {wall:,.1f} GB/s")
    rates = [Bar.of(rung.tokens_per_second, rung.floor_tokens_per_second) for rung in rungs]
    bars(speed, "Tokens per second", rungs, rates, "{:.1f}")
    floors(speed, rates, ladder.samples)
    for axis in (bandwidth, speed):
        axis.legend(loc="upper left", frameon=False, fontsize=SMALL, ncols=1 if wide else 2)
    figure.suptitle(f"{ladder.model} on {ladder.device}", color=INK, fontsize=13, fontweight="bold")
    figure.supxlabel(caption(ladder), fontsize=SMALL, color=INK)
    return figure


def caption(ladder: Ladder) -> str:
    """What was measured, and what the numbers on the bars are."""
    first = ladder.rungs[0]
    return (
        f"On each bar: its value, and that value in percent of the first bar's ({first.name}).\n"
        f"batch 1 · prompt {first.prompt_tokens} tokens · {first.new_tokens} new tokens · median of {ladder.samples} · "
        f"{ladder.sampling} · torch {ladder.torch}"
    )


class Bar:
    """A bar's height, the least and the most of its samples, and the line drawn over it, if there is one."""

    def __init__(self, value: float, low: float | None = None, high: float | None = None, line: float | None = None):
        self.value, self.line = value, line
        self.low, self.high = value if low is None else low, value if high is None else high

    @classmethod
    def of(cls, spread: Spread, line: float) -> Bar:
        return cls(spread.median, spread.min, spread.max, line)

    @property
    def share_at(self) -> float:
        """The highest that is drawn, on which the share of the line stands."""
        return max(self.value, self.high, self.line or 0.0)

    def label(self, most: float) -> tuple[float, bool]:
        """Where the bar's two lines of text go, and whether that is within the bar, which they are then centred in.

        Below the samples' spread if the bar is tall enough; else above it; and where the line drawn over a short bar would
        cross them there, above that line and the share written on it.
        """
        if self.low > (TWO_LINES + GAP) * most:
            return self.low / 2, True
        above = max(self.value, self.high) + GAP * most
        if self.line is None or self.share_at >= above + TWO_LINES * most:
            return above, False
        return self.share_at + ONE_LINE * most, False


def bars(axis: Axes, title: str, rungs: list[RungResult], of: list[Bar], form: str, wall: float = 0.0) -> None:
    """One chart: a bar per rung with its value and its percentage of the first. `wall` is a line that must be seen too."""
    most = max(wall, *(bar.share_at for bar in of))
    axis.set_title(title, color=INK, fontsize=11)
    shades = [SHADES[i % len(SHADES)] for i in range(len(of))]
    axis.bar(range(len(of)), [bar.value for bar in of], color=shades, width=0.72)
    top = most
    for x, bar in enumerate(of):
        y, inside = bar.label(most)
        top = top if inside else max(top, y + (TWO_LINES - ONE_LINE) * most)
        axis.text(
            x,
            y,
            f"{form.format(bar.value)}\n{bar.value / of[0].value:.0%}",
            ha="center",
            va="center" if inside else "bottom",
            fontsize=LARGE,
            color="white" if inside else INK,
            fontweight="bold",
        )
    axis.set_ylim(0, top + 0.25 * most)  # room for a share and the legend above all that
    axis.set_xlim(-0.6, len(of) - 0.4)
    axis.set_xticks(range(len(rungs)), [tick(rung, rungs[0]) for rung in rungs], fontsize=SMALL)
    axis.spines[["top", "right"]].set_visible(False)


def floors(axis: Axes, of: list[Bar], samples: int) -> None:
    """Over each bar the most that the memory allows and the share of it that is reached, and the spread of the samples."""
    for x, bar in enumerate(of):
        if bar.line is None:
            continue
        first = x == 0
        spread, most = f"least to most of {samples} samples", "most the memory allows, and the share of it reached"
        axis.hlines(bar.line, x - 0.42, x + 0.42, color=FLOOR, linewidth=1.6, label=most if first else "")
        axis.vlines(x, bar.low, bar.high, color=INK, linewidth=1.6, label=spread if first else "")
        share = f"{bar.value / bar.line:.0%}"
        axis.text(x, bar.share_at, share, ha="center", va="bottom", color=FLOOR, size=SMALL)


def tick(rung: RungResult, baseline: RungResult) -> str:
    """The rung's name, its type where it differs from the baseline's, its ranks if there are several, the oracle's word."""
    dtype = f"\n({rung.dtype})" if rung.dtype != baseline.dtype else ""
    ranks = f"\n{rung.ranks} ranks" if rung.ranks > 1 else ""
    return f"{rung.name}{dtype}{ranks}\n{rung.verdict}"


def read_ladder(path: Path) -> Ladder:
    """The ladder that `bench` wrote to `ladder.json`."""
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rungs = [
        RungResult(**{**rung, "tokens_per_second": Spread(**rung["tokens_per_second"])}) for rung in told.pop("rungs")
    ]
    return Ladder(**told, rungs=rungs)


if __name__ == "__main__":
    draw(read_ladder(Path(sys.argv[1])), Path(sys.argv[2]))

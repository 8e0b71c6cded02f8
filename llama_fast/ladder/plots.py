"""The picture of a ladder: memory, bandwidth and speed of every rung, and how far each is from the memory's wall.

A rung is a row of three charts, and its figures stand in columns beside the bars, where no bar, mark or other figure meets
them, however many rungs there are. `python -m llama_fast.ladder.plots ladder.json ladder.png` draws it again from the file
that `bench` wrote.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_fast.ladder.bench import Ladder, RungResult, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FLOOR = "#1b2a41", "#d1495b"
SHADES = ["#6b859e", "#5b8db8", "#2a6f97", "#1b998b", "#c98c1a", "#7a5195", "#a23b72", "#6b705c"]
SMALL = 9  # points: legible where the picture is as wide as a page
WIDTH, ROW, REST = 12.0, 0.44, 2.0  # inches: the picture, a rung's row, all that stands above and below the rows
CHARACTER, BETWEEN = 6.4, 10.0  # points: the widest of SMALL's digits, the room between two columns


@dataclass(frozen=True)
class Column:
    """Text beside a chart: one entry for each rung, under a heading of at most two lines."""

    heading: str
    entries: Sequence[str]
    colour: str = INK
    weight: str = "normal"

    @property
    def points(self) -> float:
        """A width that none of its lines exceeds."""
        return CHARACTER * max(len(line) for line in [*self.heading.split("\n"), *self.entries])


def draw(ladder: Ladder, path: Path) -> None:
    """Write `path` (PNG)."""
    picture(ladder).savefig(path, dpi=140)


def picture(ladder: Ladder) -> Figure:
    """Three bar charts with a row for each rung; the floors and the spread of the samples are drawn in."""
    from matplotlib.figure import Figure

    rungs = ladder.rungs
    figure = Figure(figsize=(WIDTH, REST + ROW * len(rungs)), layout="constrained")
    memory, bandwidth, speed = figure.subplots(1, 3, sharey=True)
    memory.set_yticks(range(len(rungs)), [tick(rung, rungs[0]) for rung in rungs], fontsize=SMALL)
    memory.set_ylim(len(rungs) - 0.5, -0.5)
    bars(memory, "Memory (GB)", [rung.peak_memory_gb for rung in rungs], 2)
    bars(bandwidth, "Bandwidth achieved (GB/s)", [rung.bandwidth_gb_per_s for rung in rungs], 1)
    wall = ladder.read_bandwidth_gb_per_s
    bandwidth.axvline(wall, color=FLOOR, linestyle=":", label=f"read bandwidth, measured: {wall:,.1f} GB/s")
    rates = [rung.tokens_per_second.median for rung in rungs]
    shares = [f"{rate / rung.floor_tokens_per_second:.0%}" for rate, rung in zip(rates, rungs)]
    bars(speed, "Tokens per second", rates, 1, Column("of the\nfloor", shares, FLOOR))
    floors(speed, rungs, ladder.samples)
    legend = figure.legend(loc="outside lower center", frameon=False, fontsize=SMALL, ncols=3, title=caption(ladder))
    legend.get_title().set(fontsize=SMALL, color=INK, ha="center")
    figure.suptitle(f"{ladder.model} on {ladder.device}", color=INK, fontsize=13, fontweight="bold")
    return figure


def caption(ladder: Ladder) -> str:
    """What was measured, and what the percentages are of."""
    first = ladder.rungs[0]
    several = (
        " Of several ranks the memory and the bandwidth are one's." if any(r.ranks > 1 for r in ladder.rungs) else ""
    )
    return (
        f"Percentages: of the first rung's value ({first.name}), and of the rung's own floor.{several}\n"
        f"batch 1 · prompt {first.prompt_tokens} tokens · {first.new_tokens} new tokens · median of {ladder.samples} · "
        f"{ladder.sampling} · torch {ladder.torch}"
    )


def bars(axis: Axes, title: str, values: list[float], digits: int, *more: Column) -> None:
    """One chart: a bar for each rung; beside it the rung's value, and that in percent of the first rung's."""
    axis.barh(range(len(values)), values, color=[SHADES[i % len(SHADES)] for i in range(len(values))], height=0.66)
    axis.set_title(title, color=INK, fontsize=11, pad=2.8 * SMALL, loc="left")
    axis.locator_params(axis="x", nbins=4)
    axis.tick_params(axis="x", labelsize=SMALL)
    axis.spines[["top", "right"]].set_visible(False)
    columns = [
        Column("", [number(value, digits) for value in values], weight="bold"),
        Column("of the\nfirst", [f"{value / values[0]:.0%}" for value in values]),
        *more,
    ]
    right = 0.0
    for column in columns:
        right += column.points + BETWEEN
        style: dict[str, Any] = {"size": SMALL, "color": column.colour, "textcoords": "offset points", "ha": "right"}
        axis.annotate(column.heading, (1, 1), (right, 2), xycoords="axes fraction", va="bottom", **style)
        style |= {"xycoords": axis.get_yaxis_transform(), "va": "center", "weight": column.weight}
        for row, entry in enumerate(column.entries):
            axis.annotate(entry, (1, row), (right, 0), **style)


def number(value: float, digits: int) -> str:
    """So many digits after the point, or the first two of a smaller one: 4128.93, 1 -> "4,128.9"; 0.00123, 1 -> "0.0012"."""
    return f"{value:,.{digits}f}" if value >= 10**-digits else f"{value:.2g}"


def floors(axis: Axes, rungs: list[RungResult], samples: int) -> None:
    """Across each bar a line at the most that the memory allows, and whiskers from the least to the most of the samples."""
    rates, rows = [rung.tokens_per_second for rung in rungs], range(len(rungs))
    walls = [rung.floor_tokens_per_second for rung in rungs]
    above, below = [row - 0.4 for row in rows], [row + 0.4 for row in rows]
    most = "floor: the most tokens/s that the memory allows"
    axis.vlines(walls, above, below, color=FLOOR, linewidth=1.8, label=most)
    whiskers = [rate.median - rate.min for rate in rates], [rate.max - rate.median for rate in rates]
    spread = f"whiskers: least to most of {samples} samples"
    axis.errorbar([rate.median for rate in rates], rows, xerr=whiskers, fmt="none", ecolor=INK, capsize=3, label=spread)


def tick(rung: RungResult, baseline: RungResult) -> str:
    """The rung's name; below it its type if that is not the baseline's, its ranks if there are several, the oracle's word."""
    dtype = [rung.dtype] if rung.dtype != baseline.dtype else []
    ranks = [f"{rung.ranks} ranks"] if rung.ranks > 1 else []
    return f"{rung.name}\n{' · '.join([*dtype, *ranks, rung.verdict])}"


def read_ladder(path: Path) -> Ladder:
    """The ladder that `bench` wrote to `ladder.json`."""
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rungs = [
        RungResult(**{**rung, "tokens_per_second": Spread(**rung["tokens_per_second"])}) for rung in told.pop("rungs")
    ]
    return Ladder(**told, rungs=rungs)


if __name__ == "__main__":
    draw(read_ladder(Path(sys.argv[1])), Path(sys.argv[2]))

"""The picture of a ladder: memory, bandwidth and speed of every rung, and how far each is from the memory's wall."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llama_fast.ladder.bench import Ladder, RungResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FLOOR = "#1b2a41", "#d1495b"
SHADES = ["#6b859e", "#5b8db8", "#2a6f97", "#1b998b", "#c98c1a", "#7a5195", "#a23b72", "#6b705c"]


def draw(ladder: Ladder, path: Path) -> None:
    """Write `path` (PNG): three bar charts with percentages against the baseline, the floor drawn in."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rungs = ladder.rungs
    size = max(15.0, 2.9 * len(rungs)), 5.6
    figure, (memory, bandwidth, speed) = plt.subplots(1, 3, figsize=size, constrained_layout=True)
    wall = ladder.read_bandwidth_gb_per_s
    most_memory = max(rung.peak_memory_gb for rung in rungs)
    most_speed = max(max(rung.floor_tokens_per_second, rung.tokens_per_second.max) for rung in rungs)
    bars(memory, "Memory (GB)", rungs, [rung.peak_memory_gb for rung in rungs], "{:.2f}", most_memory)
    read = [rung.bandwidth_gb_per_s for rung in rungs]
    bars(bandwidth, "Bandwidth achieved (GB/s)", rungs, read, "{:.1f}", max(wall, *read))
    bandwidth.axhline(wall, color=FLOOR, linewidth=1.6, label=f"measured read bandwidth, {wall:,.1f} GB/s")
    bars(speed, "Tokens per second", rungs, [rung.tokens_per_second.median for rung in rungs], "{:.1f}", most_speed)
    for x, rung in enumerate(rungs):
        low, high = rung.tokens_per_second.min, rung.tokens_per_second.max
        speed.vlines(x, low, high, color=INK, linewidth=1.2)
        label = "most the memory allows, and the share of it reached" if x == 0 else None
        speed.hlines(rung.floor_tokens_per_second, x - 0.42, x + 0.42, color=FLOOR, linewidth=1.6, label=label)
        share = rung.tokens_per_second.median / rung.floor_tokens_per_second
        above = max(rung.floor_tokens_per_second, high)
        speed.text(x, above, f"{share:.0%}", ha="center", va="bottom", color=FLOOR, size=8)
    for axis in (bandwidth, speed):
        axis.legend(loc="upper left", frameon=False, fontsize=8)
    figure.suptitle(f"{ladder.model} on {ladder.device}", color=INK, fontsize=13, fontweight="bold")
    first = rungs[0]
    figure.supxlabel(
        f"batch 1 · prompt {first.prompt_tokens} tokens · {first.new_tokens} new tokens · median of {ladder.samples} · "
        f"greedy · torch {ladder.torch}",
        fontsize=8,
        color=INK,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)


def bars(axis: Axes, title: str, rungs: list[RungResult], values: list[float], form: str, most: float) -> None:
    """One chart: a bar per rung with its value and its percentage of the first, in it where it is tall enough."""
    axis.set_title(title, color=INK, fontsize=11)
    axis.bar(range(len(values)), values, color=[SHADES[i % len(SHADES)] for i in range(len(values))], width=0.72)
    for x, value in enumerate(values):
        inside = value > 0.12 * most  # two lines are that tall
        axis.text(
            x,
            value / 2 if inside else value + 0.02 * most,
            f"{form.format(value)}\n{value / values[0]:.0%}",
            ha="center",
            va="center" if inside else "bottom",
            fontsize=9,
            color="white" if inside else INK,
            fontweight="bold",
        )
    axis.set_ylim(0, most * 1.2)  # room for the legend above the wall
    axis.set_xticks(range(len(rungs)), [tick(rung, rungs[0]) for rung in rungs], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def tick(rung: RungResult, baseline: RungResult) -> str:
    """The rung's name, its type where it differs from the baseline's, and the oracle's word."""
    dtype = f"\n({rung.dtype})" if rung.dtype != baseline.dtype else ""
    return f"{rung.name}{dtype}\n{rung.verdict}"

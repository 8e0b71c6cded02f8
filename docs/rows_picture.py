"""Draw docs/rows.png from the records: `python docs/rows_picture.py`. Tokens/s against the number of texts at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))

from measurements_page import Record, records  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SMALL = "#1b2a41", 9
OURS = {"bf16": "#2a6f97", "int8": "#1b998b", "int4": "#c98c1a"}
PEERS = {"F16": "bf16", "Q8_0": "int8", "Q4_0": "int4"}
"""llama.cpp's types, and which of ours has about as many bits."""


def line(record: Record, column: str) -> tuple[list[int], list[float]]:
    """The rows for which a record has a value in this column, and the values."""
    head, *lines = [[cell.strip() for cell in text.split("|")[1:-1]] for text in record.values.strip().splitlines()]
    pairs = [(int(cells[0]), cells[head.index(column)]) for cells in lines if cells[0].isdigit()]
    there = [(rows, float(value.replace(",", ""))) for rows, value in pairs if value not in ("", "-")]
    return [rows for rows, _ in there], [value for _, value in there]


def plotted(axes: Axes, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], labels=["1", "2", "4", "8", "16", "32", "64"])
    axes.set_yticks([200, 500, 1000, 2000, 5000, 10_000], labels=["200", "500", "1,000", "2,000", "5,000", "10,000"])
    axes.minorticks_off()
    axes.set_title(title, color=INK, fontsize=11)
    axes.set_xlabel("texts at once", color=INK)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=SMALL, loc="lower right")


def main() -> None:
    from matplotlib.figure import Figure

    found = {record.name: record for record in records()}
    figure = Figure(figsize=(11.5, 5.2), layout="constrained")
    first, second = figure.subplots(1, 2, sharey=True)
    for kind in ("bf16", "int8"):
        first.plot(*line(found["rows"], f"{kind}, tokens/s"), "o-", color=OURS[kind], label=f"llama-fast {kind}")
    for peer, kind in PEERS.items():
        told = line(found["llama-cpp-h100-rows"], f"{peer}, tokens/s")
        first.plot(*told, "x--", color=OURS[kind], alpha=0.7, label=f"llama.cpp {peer}")
    second.plot(*line(found["h200-int4-rows"], "tokens/s"), "o-", color=OURS["int4"], label="llama-fast int4")
    second.plot(*line(found["h200-bf16-rows"], "ours, tokens/s"), "o-", color=OURS["bf16"], label="llama-fast bf16")
    plotted(first, "one H100")
    plotted(second, "one H200")
    first.set_ylabel("new tokens/s of all texts", color=INK)
    figure.suptitle("Llama-2-7B shape: prompts of 6 tokens, 64 new ones", color=INK, fontsize=13, fontweight="bold")
    figure.savefig(Path(__file__).with_name("rows.png"), dpi=120)


if __name__ == "__main__":
    main()

"""What a certificate measured, drawn by matplotlib as SVG that stands within a page: the same certificate, the same bytes."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from oracle.report.certificate import Certificate

Picture = tuple[str, str, str]
"""A title, what is plotted in a sentence, and the drawing (or why there is none)."""

INCHES = (8.2, 3.0)
MOST_NAMES = 34
"""Names that fit an axis, turned upright; of more every second, third, ... one stands there, and the last."""
SETTINGS = {
    "svg.hashsalt": "llama-oracle",
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
BUDGET = {"color": "#b00020", "linestyle": "--", "linewidth": 1.2, "label": "budget"}


def pictures(certificate: Certificate) -> list[Picture]:
    """Every picture of a certificate; one of words where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        why = "This page has no pictures: matplotlib is not installed (pip install 'llama-fast[cli]')."
        return [("Pictures", why, "")]
    found = []
    if any(certificate.layers.values()):
        found.append(_layers(certificate))
    parts = {name.removesuffix(" stages"): part for name, part in certificate.parts.items() if name.endswith(" stages")}
    bars = {
        dtype: [(check.name, share(check.measured, check.budget)) for check in part.checks if check.compared]
        for dtype, part in parts.items()
    }
    if any(bars.values()):
        found.append(_parts(bars))
    for name, rows in certificate.positions.items():
        for row, curve in enumerate(rows):
            found.append(_positions(f"Error against position: {name}, row {row}, prefill", curve))
    if certificate.histogram:
        found.append(_drift(certificate.histogram))
    return found


def share(measured: float, budget: float) -> float:
    """Of a budget; one of nothing is kept, or overdrawn by a million."""
    return measured / budget if budget > 0 else float(measured > 0) * 1e6


def _layers(certificate: Certificate) -> Picture:
    names = list(dict.fromkeys(place for curve in certificate.layers.values() for place, _ in curve))

    def draw(axes: Any) -> None:
        for dtype, curve in certificate.layers.items():
            axes.plot(*drawable([(names.index(place), used) for place, used in curve]), marker=".", label=dtype)
        axes.axhline(1.0, **BUDGET)
        _decades(axes, "share of its budget")
        _named(axes, names)

    told = "Of each block's parts the one that is nearest to its budget, as a share of it; beyond 1 it differs."
    return "Error against layer", told, drawn(draw)


def _parts(bars: dict[str, list[tuple[str, float]]]) -> Picture:
    names = list(dict.fromkeys(name for kinds in bars.values() for name, _ in kinds))
    width = 0.8 / len(bars)

    def draw(axes: Any) -> None:
        for number, (dtype, kinds) in enumerate(bars.items()):
            xs, ys = drawable(
                [(names.index(name) + (number - (len(bars) - 1) / 2) * width, used) for name, used in kinds]
            )
            axes.bar(xs, ys, width, label=dtype)
        axes.axhline(1.0, **BUDGET)
        _decades(axes, "share of its budget")
        _named(axes, names)

    told = "For every part of a block that a verdict names, the block where it is nearest to its budget."
    return "Error against part", told, drawn(draw)


def _positions(title: str, curve: Any) -> Picture:
    def draw(axes: Any) -> None:
        axes.plot(*drawable(list(enumerate(curve.subject))), label="subject")
        axes.plot(*drawable(list(enumerate(curve.yardstick))), label="yardstick")
        axes.plot(*drawable(list(enumerate(curve.budget))), **BUDGET)
        _decades(axes, "relative error of logits")
        axes.set_xlabel("position")

    return (
        title,
        "RMS over the vocabulary, as a share of the logits' own, of the subject and of the reference in its type.",
        drawn(draw),
    )


def _drift(histogram: dict[str, list[int]]) -> Picture:
    def draw(axes: Any) -> None:
        for who, counts in histogram.items():
            edges = [10.0 ** (i / 2 - 12) for i in range(len(counts) + 1)]
            axes.stairs(counts, edges, label=who, linewidth=1.4)
        axes.set_xscale("log")
        axes.set_xlabel("KL divergence from the original weights' predictions")
        axes.set_ylabel("positions")

    return "Drift", "Positions of the text by how far their predictions moved.", drawn(draw)


def drawable(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The points that a logarithmic axis can show."""
    kept = [(x, y) for x, y in points if math.isfinite(y) and y > 0]
    return [x for x, _ in kept], [y for _, y in kept]


def _decades(axes: Any, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10.0, numticks=12))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label)


def _named(axes: Any, names: Sequence[str]) -> None:
    step = -(-len(names) // MOST_NAMES)
    last = len(names) - 1
    at = [i for i in range(0, len(names), step) if i == last or last - i >= step] + [last]
    at = sorted(set(at))
    axes.set_xticks(at, [names[i] for i in at], rotation=90)
    axes.set_xlim(-0.6, last + 0.6)


def drawn(draw: Any) -> str:
    """A figure as an SVG element, or words where nothing of it can be drawn."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(SETTINGS):
        figure = Figure(INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        if not any(_shows(artist) for artist in (*axes.lines, *axes.patches)):
            return "<p>nothing that could be drawn</p>"
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href").strip()


def _shows(artist: Any) -> bool:
    """Whether there is something of a curve or a bar, the budget's line aside."""
    if artist.get_label() == BUDGET["label"]:
        return False
    data = artist.get_xdata() if hasattr(artist, "get_xdata") else artist.get_path().vertices
    return len(data) > 0

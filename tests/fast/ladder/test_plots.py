"""The picture of a ladder: nothing written over anything else, legible at the width of a page."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from llama_fast.ladder.bench import Ladder, Spread
from llama_fast.ladder.plots import Bar, picture, read_ladder

FOUR_GPUS = read_ladder(Path(__file__).resolve().parents[3] / "docs/ladder-4xh200.json")
PAGE_PIXELS = 900  # the width at which a page shows a picture


def ladder(*rates: tuple[float, float, float, float], bandwidth: float = 2000.0) -> Ladder:
    """One whose rungs reach (least, median, most) tokens/s of a floor."""
    rungs = [
        replace(
            FOUR_GPUS.rungs[i % 8],
            tokens_per_second=Spread(median, least, most),
            floor_tokens_per_second=floor,
            bandwidth_gb_per_s=bandwidth * (i + 1) / len(rates),
        )
        for i, (least, median, most, floor) in enumerate(rates)
    ]
    return replace(FOUR_GPUS, rungs=rungs, read_bandwidth_gb_per_s=bandwidth)


LADDERS = {
    "eight rungs on four GPUs": FOUR_GPUS,
    "six rungs of an H100": ladder(
        (18.3, 21.2, 23.1, 233.5),
        (191.9, 192.6, 192.9, 233.5),
        (289.2, 294.0, 296.4, 464.8),
        (272.1, 273.5, 281.0, 332.0),
        (227.8, 227.8, 227.8, 233.5),
        (400.0, 400.7, 400.8, 464.8),
    ),
    "four rungs of a CPU": ladder(
        (44.4, 46.8, 48.0, 97.5), (70, 74.5, 77.9, 97.5), (181, 198.6, 202, 378), (71, 74, 84, 108)
    ),
    "one rung": ladder((1.0, 1.1, 1.2, 5.0)),
    "a floor right above a short bar": ladder((9.0, 10.0, 11.0, 12.0), (90.0, 100.0, 110.0, 400.0)),
    "a floor amid a short bar's label": ladder((9.0, 10.0, 11.0, 50.0), (90.0, 100.0, 110.0, 400.0)),
    "a floor right above a short bar's label": ladder((9.0, 10.0, 11.0, 80.0), (90.0, 100.0, 110.0, 400.0)),
    "samples far apart": ladder((10.0, 200.0, 390.0, 400.0), (100.0, 390.0, 395.0, 400.0)),
    "faster than its floor": ladder((19.0, 20.0, 21.0, 18.0), (300.0, 310.0, 320.0, 305.0)),
}


@pytest.fixture(params=LADDERS.values(), ids=LADDERS)
def drawn(request: pytest.FixtureRequest) -> Figure:
    figure = picture(request.param)
    FigureCanvasAgg(figure).draw()
    return figure


def written(axis: Axes) -> list[tuple[str, Bbox]]:
    """What is written on one chart, and where, in pixels."""
    legend = axis.get_legend()
    texts = [*axis.texts, axis.title, *axis.get_xticklabels(), *(legend.get_texts() if legend else ())]
    return [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]


def test_no_text_is_written_over_another(drawn: Figure) -> None:
    for axis in drawn.axes:
        for (one, here), (other, there) in itertools.combinations(written(axis), 2):
            assert not here.padded(-0.5).overlaps(there.padded(-0.5)), (one, other)


def test_no_floor_and_no_spread_of_samples_crosses_a_text(drawn: Figure) -> None:
    for axis in drawn.axes:
        for collection in axis.collections:
            for path in collection.get_paths():
                line = Bbox(axis.transData.transform(path.vertices[[0, -1]]))
                line = Bbox.from_extents(line.x0, line.y0 - 0.5, line.x1 + 0.5, line.y1 + 0.5)
                for text, here in written(axis):
                    assert not line.overlaps(here.padded(-1.5)), (axis.get_title(), text)


def test_every_text_is_legible_where_a_page_shows_the_picture(drawn: Figure) -> None:
    pixels_per_point = PAGE_PIXELS / drawn.get_figwidth() / 72
    for axis in drawn.axes:
        legend = axis.get_legend()
        texts = [*axis.texts, *axis.get_xticklabels(), *(legend.get_texts() if legend else ())]
        assert min(text.get_fontsize() for text in texts) * pixels_per_point >= 8


def test_the_picture_says_what_its_marks_mean(drawn: Figure) -> None:
    told = [text for axis in drawn.axes if axis.get_legend() for text in axis.get_legend().get_texts()]
    said = " ".join(text.get_text() for text in [*told, drawn._supxlabel])
    for words in ("least to most of 5 samples", "the share of it reached", "in percent of the first bar's (baseline)"):
        assert words in said


def test_a_label_stays_within_a_tall_bar_below_its_samples() -> None:
    assert Bar(80, low=60, high=90, line=95).label(most=100) == (30, True)


def test_a_label_stands_above_the_line_that_would_cross_it() -> None:
    free, crossed = Bar(5, line=60).label(most=100), Bar(5, line=12).label(most=100)
    assert free == (7, False) and crossed[0] > 12 and not crossed[1]

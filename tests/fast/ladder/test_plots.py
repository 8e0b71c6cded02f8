"""The picture of a ladder: nothing written over anything else, legible at the width of a page."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from llama_fast.ladder.bench import Ladder, Spread
from llama_fast.ladder.plots import number, picture, read_ladder
from llama_fast.ladder.rungs import RUNGS

FOUR_GPUS = read_ladder(Path(__file__).resolve().parents[3] / "docs/ladder-4xh200.json")
PAGE_PIXELS = 900  # the width at which a page shows a picture


def ladder(*rates: tuple[float, float, float, float], bandwidth: float = 2000.0) -> Ladder:
    """One whose rungs reach (least, median, most) tokens/s of a floor."""
    rungs = [
        replace(
            FOUR_GPUS.rungs[i % 8],
            name=list(RUNGS)[i],
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
    "three rungs": replace(FOUR_GPUS, rungs=FOUR_GPUS.rungs[:3]),
    "fourteen rungs, of two types, on four GPUs": ladder(
        *((10.0 * i, 11.0 * i, 12.5 * i, 20.0 * i) for i in range(1, 15))
    ),
    "values of seven digits beside small ones": ladder(
        (0.001, 0.0012, 0.0013, 0.01), (1.2e6, 1.3e6, 1.4e6, 2e6), bandwidth=7_654_321.0
    ),
    "one rung": ladder((1.0, 1.1, 1.2, 5.0)),
    "a floor right above a short bar": ladder((9.0, 10.0, 11.0, 12.0), (90.0, 100.0, 110.0, 400.0)),
    "a floor amid a short bar's label": ladder((9.0, 10.0, 11.0, 50.0), (90.0, 100.0, 110.0, 400.0)),
    "a floor right above a short bar's label": ladder((9.0, 10.0, 11.0, 80.0), (90.0, 100.0, 110.0, 400.0)),
    "samples far apart": ladder((10.0, 200.0, 390.0, 400.0), (100.0, 390.0, 395.0, 400.0)),
    "faster than its floor": ladder((19.0, 20.0, 21.0, 18.0), (300.0, 310.0, 320.0, 305.0)),
}


@pytest.fixture(scope="module", params=LADDERS.values(), ids=LADDERS)
def drawn(request: pytest.FixtureRequest) -> Figure:
    figure = picture(request.param)
    FigureCanvasAgg(figure).draw()
    return figure


def written(figure: Figure) -> list[Text]:
    """All that is written on the picture."""
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def test_no_text_is_written_over_another(drawn: Figure) -> None:
    for one, other in itertools.combinations(written(drawn), 2):
        here, there = one.get_window_extent().padded(-0.5), other.get_window_extent().padded(-0.5)
        assert not here.overlaps(there), (one.get_text(), other.get_text())


def test_no_text_leaves_the_picture_and_none_is_written_over_a_chart(drawn: Figure) -> None:
    for text in written(drawn):
        here = text.get_window_extent()
        assert drawn.bbox.padded(1).contains(here.x0, here.y0) and drawn.bbox.padded(1).contains(here.x1, here.y1), text
        assert not any(axis.bbox.padded(-1).overlaps(here) for axis in drawn.axes), text


def test_a_chart_is_wide_enough_to_be_read(drawn: Figure) -> None:
    assert all(axis.bbox.width >= 0.12 * drawn.bbox.width for axis in drawn.axes)


def test_every_bar_and_mark_lies_within_its_chart(drawn: Figure) -> None:
    for axis in drawn.axes:
        left, right = axis.get_xlim()
        marks = [point[0] for lines in axis.collections for path in lines.get_paths() for point in path.vertices]
        assert marks or axis is not drawn.axes[2], "the third chart has floors and whiskers"
        assert all(left <= value <= right for value in [*marks, *(bar.get_width() for bar in axis.patches)])


def test_every_text_is_legible_where_a_page_shows_the_picture(drawn: Figure) -> None:
    pixels_per_point = PAGE_PIXELS / drawn.get_figwidth() / 72
    assert min(text.get_fontsize() for text in written(drawn)) * pixels_per_point >= 8


def test_the_picture_says_what_its_marks_and_its_percentages_mean(drawn: Figure) -> None:
    said = " ".join(text.get_text() for text in written(drawn))
    for words in (
        "whiskers: least to most of 5 samples",
        "floor: the most tokens/s that the memory allows",
        "of the first rung's value (baseline), and of the rung's own floor",
    ):
        assert words in said


def test_a_rung_s_row_tells_its_figures_and_the_oracle_s_word() -> None:
    figure = picture(FOUR_GPUS)
    FigureCanvasAgg(figure).draw()
    texts = [text.get_text() for text in written(figure)]
    assert {"1,091.0", "4005%", "41%", "2.51", "18%", "1,819.0", "503%", "tp-int8\n4 ranks · AGREE"} <= set(texts)


def test_a_number_keeps_two_digits_however_small_it_is() -> None:
    assert [number(4128.93, 1), number(14.0, 2), number(0.00123, 1)] == ["4,128.9", "14.00", "0.0012"]

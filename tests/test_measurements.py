"""The page of measurements, README's table and the rows of the scaling model are what the records say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_fast.ladder.plots import read_ladder
from llama_fast.ladder.scaling import ROWS

DOCS = Path(__file__).parents[1] / "docs"
MAKE = SimpleNamespace(**runpy.run_path(str(DOCS / "measurements_page.py")))
RECORDS = MAKE.records()
PAGE = (DOCS / "measurements.md").read_text(encoding="utf-8")
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
REMEDY = "run `python docs/measurements_page.py`"


def test_the_page_is_what_the_records_say() -> None:
    assert MAKE.page(RECORDS) == PAGE, REMEDY


def test_the_readmes_table_is_what_the_records_say() -> None:
    assert MAKE.with_table(README, MAKE.reached(RECORDS)) == README, REMEDY


def test_the_page_of_quality_is_what_the_records_say() -> None:
    assert MAKE.quality(RECORDS) == (DOCS / "quality.md").read_text(encoding="utf-8"), REMEDY


def test_every_figure_of_the_readmes_table_names_a_record() -> None:
    lines = (DOCS / "measurements/reached.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 5
    for line in lines[2:]:
        left = MAKE.REFERENCE.sub("", line)
        name, *cells = left.strip("|").split("|")
        assert not re.search(r"\d", "".join(cells)), left
        assert not re.search(r"\d+\.\d", name), left


def test_the_scaling_models_rows_are_those_of_the_records() -> None:
    held = {(system.name, shape, encoding, ranks): seen for system, shape, encoding, ranks, seen in ROWS}
    assert len(held) == len(ROWS) and held == MAKE.scaling_rows(RECORDS)


def test_the_ladder_of_four_gpus_is_recorded_as_its_file_says() -> None:
    (record,) = (record for record in RECORDS if record.name == "4xh200-7b")
    rows = [line.split("|")[1].strip() for line in record.values.strip().splitlines()[1:]]
    rungs = read_ladder(DOCS / "ladder-4xh200.json").rungs
    assert len(rows) == len(rungs)
    for row, rung in zip(rows, rungs):
        assert row.split()[0] == rung.name and record.cell(row, "oracle") == rung.verdict
        told = record.cell(row, "tokens/s").replace("*", "").replace(",", "")
        rate = rung.tokens_per_second
        assert told == f"{rate.median:.1f} ({rate.min:.1f}-{rate.max:.1f})"
        assert MAKE.number(record.cell(row, "floor")) == f"{rung.floor_tokens_per_second:,.1f}"


@pytest.mark.parametrize(("picture", "rungs"), [("ladder-4xh200", 8), ("ladder-h100", 6), ("ladder-cpu", 4)])
def test_a_picture_of_a_ladder_is_drawn_of_what_its_record_tells(picture: str, rungs: int) -> None:
    ladder = runpy.run_path(str(DOCS / "ladder_pictures.py"))["ladders"]()[picture]
    (record,) = (record for record in RECORDS if f"]({picture}.png)" in record.notes)
    rows = [line.split("|")[1].strip() for line in record.values.strip().splitlines()[1:]]
    assert len(rows) == len(ladder.rungs) == rungs and (DOCS / f"{picture}.png").exists()
    for row, rung in zip(rows, ladder.rungs):
        column = "memory" if "| memory |" in record.values else "memory a GPU"
        rate = rung.tokens_per_second
        share = float(record.cell(row, "share").rstrip("%")) / 100
        assert (
            record.cell(row, column) == f"{rung.peak_memory_gb:.2f} GB" and record.cell(row, "oracle") == rung.verdict
        )
        assert f"{rate.median:,.1f}" in record.cell(row, "tokens/s") and rate.min <= rate.median <= rate.max
        assert rung.bandwidth_gb_per_s / ladder.read_bandwidth_gb_per_s == pytest.approx(share, abs=0.011)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_a_record_is_whole(record: SimpleNamespace) -> None:
    assert re.fullmatch(r"(before )?\d{4}-\d\d-\d\d", record.date)
    assert record.question.endswith("?") and record.answer.strip() and record.commit and record.command
    widths = {line.count("|") for line in record.values.strip().splitlines()}
    assert len(widths) <= 1, "rows of unequal width"


def test_the_newest_day_comes_first_and_every_question_has_its_heading() -> None:
    headings = re.findall(r"^## (before )?([\d-]+): .*\?$", PAGE, re.M)
    days = [(day, not before) for before, day in headings]
    assert len(days) == len(RECORDS) > 60 and days == sorted(days, reverse=True)


def test_lines_are_of_one_length_but_for_tables() -> None:
    assert [line for line in PAGE.splitlines() if len(line) > MAKE.WIDTH and not line.startswith("|")] == []


def test_what_the_page_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert len(links) >= 4
    for link in links:
        assert (DOCS / link).exists(), link


def test_a_reference_to_no_value_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match="record h100-ladder: 0 values in row 'fused', column 'nothing'"):
        MAKE.filled("{h100-ladder: fused: nothing}", RECORDS)
    assert MAKE.filled("**{2xh200: 7B int8 on 2: tokens/s}** ({2xh200: 7B int8 on 2: ratio})", RECORDS) == (
        "**710.1** (1.54x)"
    )


def test_no_line_of_a_sentence_reads_as_a_list_or_a_heading() -> None:
    """Where a line is broken before a plus or a dash, Markdown would take it for an item."""
    machines = PAGE.index("## The machines")
    assert re.findall(r"^(?:[-+*>]|#(?!# [\dbT])|1[.)]) .*", PAGE[:machines], re.M) == ["# Measurements"]

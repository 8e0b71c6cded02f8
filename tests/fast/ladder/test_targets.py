"""The targets of the GPU tests: every rung has one, and a card's own are what the records say was reached there."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_fast.ladder.rungs import RUNGS
from tests.gpu.targets import KEPT, TARGETS, bar, target

RECORDS = {
    record.name: record
    for record in runpy.run_path(str(Path(__file__).parents[3] / "docs/measurements_page.py"))["records"]()
}
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
OVER_TWO = {"7B bf16 on 2": "tp", "7B int8 on 2": "tp-int8"}
MEASURED = [
    (H100, "reached", "h100-ladder", "share"),
    (H200, "reached", "4xh200-7b", "share"),
    (H200, "reached", "h200-narrow-ladder", "of floor"),
    (H200, "reached_by_2_ranks", "2xh200", "of floor"),
    (H200, "reached_by_4_ranks", "4xh200-7b", "share"),
]


def rung(name: str, ranks: int = 1) -> Any:
    return SimpleNamespace(name=name, ranks=ranks, floor_tokens_per_second=200.0)


def recorded(name: str, column: str) -> dict[str, float]:
    """The share of the floor that a record tells of each rung."""
    record = RECORDS[name]
    rows = [line.split("|")[1].strip() for line in record.values.strip().splitlines()[1:]]
    return {OVER_TWO.get(row, row.split()[0]): float(record.cell(row, column).rstrip("%")) / 100 for row in rows}


def test_the_general_targets_say_something_of_every_rung_of_a_gpu_and_of_no_other() -> None:
    assert set(TARGETS["generic"]["share"]) == {name for name, rung in RUNGS.items() if not rung.needs_cpu}


@pytest.mark.parametrize(("gpu", "table", "record", "column"), MEASURED)
def test_what_was_reached_on_a_card_is_what_a_record_says(gpu: str, table: str, record: str, column: str) -> None:
    told, held = recorded(record, column), TARGETS[gpu][table]
    both = set(told) & set(held)
    assert len(both) >= 2
    for name in both:
        assert held[name] == pytest.approx(told[name], abs=0.0051), name


def test_every_share_that_is_held_to_have_been_reached_is_of_a_rung_and_of_a_record() -> None:
    for gpu, entry in TARGETS.items():
        for table in (table for table in entry if table.startswith("reached")):
            told = set().union(*(recorded(name, column) for g, t, name, column in MEASURED if (g, t) == (gpu, table)))
            assert set(entry[table]) <= told & set(RUNGS), (gpu, table)
            over = {RUNGS[name].over_ranks for name in entry[table]}
            assert over == {table != "reached"}, "a table of several ranks is of the rungs over ranks, and no other is"


@pytest.mark.parametrize(("name", "ranks", "reached"), [("fused", 1, 0.911), ("tp", 2, 0.79), ("tp", 4, 0.664)])
def test_a_card_is_held_to_97_percent_of_what_it_reached_with_so_many_ranks(
    name: str, ranks: int, reached: float
) -> None:
    goal, source = target(rung(name, ranks), H200)
    assert goal == pytest.approx(0.97 * reached * 200) and f"97% of {reached:.1%}" in source and KEPT == 0.97


def test_a_measured_target_asks_for_more_than_the_general_one() -> None:
    for gpu, entry in TARGETS.items():
        for name, reached in entry.get("reached", {}).items():
            assert KEPT * reached > TARGETS["generic"]["share"][name], (gpu, name)


def test_a_published_figure_is_held_as_it_was_published() -> None:
    assert target(rung("tp-int8", 4), "NVIDIA A100-SXM4-40GB") == (250, "published for 4 x NVIDIA A100-SXM4-40GB")
    assert "97%" not in target(rung("tp-int8", 2), "NVIDIA A100-SXM4-40GB")[1]


@pytest.mark.parametrize(("gpu", "ranks", "told"), [("NVIDIA L4", 1, "NVIDIA L4"), (H200, 3, "NVIDIA H200 by 3 ranks")])
def test_a_rung_that_was_not_measured_there_has_the_general_target_and_says_so(gpu: str, ranks: int, told: str) -> None:
    goal, source = target(rung("tp", ranks), gpu)
    assert goal == 200 * TARGETS["generic"]["share"]["tp"] and source.endswith(f"no share of its own for {told}")


def test_a_bar_of_the_wall_is_the_cards_own_or_the_general_one() -> None:
    assert bar("cold_seconds", "NVIDIA L4") == TARGETS["generic"]["wall"]["cold_seconds"]
    assert bar("cold_seconds", H100) < bar("cold_seconds", "NVIDIA L4")


def test_a_name_that_the_table_does_not_know_is_refused() -> None:
    for ask in (lambda: target(rung("warp"), "NVIDIA L4"), lambda: bar("warp", "NVIDIA L4")):
        with pytest.raises(ValueError, match=r"targets.toml: .* says nothing of .*warp"):
            ask()

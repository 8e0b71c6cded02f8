"""Tiles of unknown shapes: which are tried, which is chosen, and how they are kept. The clock is ours."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.errors import TritonError

from llama_fast.kernels import first_use
from llama_fast.kernels.candidates import candidates
from llama_fast.kernels.first_use import FirstUse, Ranks
from llama_fast.kernels.found import SWITCH, Found, Product, entry, found_tiles, kept_in, read, rows_class, write
from llama_fast.kernels.stored import storage_of_word
from llama_fast.kernels.tuning import ONE_ROW, Tile, general_tile, next_power_of_2

SHAPES = {
    "8B": [("rope", 6144, 4096), ("add", 4096, 4096), ("gated", 28672, 4096), ("add", 4096, 14336)],
    "3B": [("rope", 5120, 3072), ("add", 3072, 3072), ("gated", 16384, 3072), ("add", 3072, 8192)],
    "13B": [("rope", 15360, 5120), ("add", 5120, 5120), ("gated", 27648, 5120), ("add", 5120, 13824)],
    "heads": [("plain", 128256, 2048), ("plain", 128256, 3072), ("send", 4096, 2752), ("plain", 49152, 576)],
}
WORDS = ("bfloat16", "int8", "float8_e4m3fn", "int4-g128", "int4-g32", "sparse", "sparse_int8")
A, B = Product("add", 4096, 14336, 1, "int4-g128", 2), Product("gated", 28672, 4096, 1, "int8", 2)


@pytest.mark.parametrize("word", WORDS)
def test_few_candidates_are_tried_and_the_rules_tile_is_one_of_them(word: str) -> None:
    for (epilogue, n, k), rows in itertools.product(itertools.chain(*SHAPES.values()), (1, 2, 8)):
        found = candidates(Product(epilogue, n, k, rows, word, 2))
        assert 2 <= len(found) == len(set(found)) <= 12
        general = general_tile(epilogue, n, k, rows, storage_of_word(word))
        assert found[0]._replace(convert="plain") == general._replace(convert="plain")
        for tile in found:
            for size in (tile.rows, tile.columns, tile.warps, tile.slices):
                assert size == next_power_of_2(size), tile
            assert tile.rows >= (2 if epilogue == "rope" else 1) and tile.columns <= next_power_of_2(k)
            if rows > 1 and not tile.vector:  # tensor cores
                assert tile.rows * (2 if epilogue == "gated" else 1) >= 16 and tile.warps >= tile.slices


def test_what_won_for_the_nearest_shape_is_tried() -> None:
    """The 8B's gated product is the 7B's with a few more rows."""
    for word, storage in (("bfloat16", 2), ("int4-g128", "int4"), ("sparse", "sparse")):
        assert ONE_ROW["H100", "gated", 22016, 4096, storage] in candidates(Product("gated", 28672, 4096, 1, word, 2))  # type: ignore[index]


def test_rows_of_one_class_have_one_tile() -> None:
    assert [rows_class(m) for m in (1, 2, 3, 8, 9, 16, 17, 128)] == [1, 2, 8, 8, 16, 16, 32, 128]


class Step:
    """A pass over two products, and a stopwatch by which a tile takes its place in an order."""

    def __init__(self, found: Found, best: dict[Product, int], broken: dict[Product, int] | None = None):
        self.found, self.best, self.broken = found, best, broken or {}
        self.runs = self.timed = 0

    def run(self) -> dict[Product, Tile | None]:
        self.runs += 1
        return {product: self.found.of(product) for product in self.best}

    def stopwatch(self, run: Callable[[], object]) -> Callable[[], float]:
        tiles: Any = run()
        us = 100.0
        for product, tile in tiles.items():
            place = candidates(product).index(tile) if tile else 0
            if place == self.broken.get(product, -1):
                raise TritonError("out of resource: shared memory")
            us += abs(place - self.best[product])

        def seconds() -> float:
            self.timed += 1
            return us

        return seconds


def test_the_fastest_tile_of_each_product_is_chosen_beside_those_already_chosen_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Found("NVIDIA H200", tmp_path / "tiles" / "h200.json")
    step = Step(found, {A: 5, B: 2})
    chosen = FirstUse(found, step.stopwatch, Ranks()).choose(step.run)
    assert chosen == {A: candidates(A)[5], B: candidates(B)[2]}
    assert found.of(A) == candidates(A)[5]
    first, last = capsys.readouterr().err.splitlines()
    assert "choosing tiles on NVIDIA H200 for 1 row" in first and "add 4096 x 14336 int4-g128" in first
    assert "tiles chosen in" in last and "a pass takes 100.0 us, with general tiles 107.0" in last
    assert str(found.file) in last
    again = Found("NVIDIA H200", found.file)
    assert again.known == chosen
    step = Step(again, {A: 5, B: 2})
    assert FirstUse(again, step.stopwatch, Ranks()).choose(step.run) == {}
    assert step.timed == 0 and capsys.readouterr().err == "", "what is known costs nothing and says nothing"


def test_a_candidate_that_this_gpu_cannot_run_is_no_candidate(capsys: pytest.CaptureFixture[str]) -> None:
    found = Found("NVIDIA L4")
    step = Step(found, {A: 5, B: 2}, broken={A: 5})
    chosen = FirstUse(found, step.stopwatch, Ranks()).choose(step.run)
    assert chosen[A] in (candidates(A)[4], candidates(A)[6]) and chosen[B] == candidates(B)[2]
    assert "no candidate" in capsys.readouterr().err


def test_the_switch_turns_it_off_and_knows_two_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "x.json", {A: Tile(2, 4096, 8)}, "NVIDIA H200")
    monkeypatch.setenv(SWITCH, "0")
    found = Found("NVIDIA H200", tmp_path / "x.json")
    step = Step(found, {A: 5})
    assert FirstUse(found, step.stopwatch, Ranks()).choose(step.run) == {}
    assert step.runs == 0 and found.of(A) is None, "neither sought nor read"
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(ValueError, match=rf"{SWITCH}='yes' must be 1 .* or 0"):
        FirstUse(found, step.stopwatch, Ranks()).choose(step.run)


def test_what_is_spent_is_not_spent_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = Found("NVIDIA H200")
    step = Step(found, {A: 5, B: 2})
    choosing = FirstUse(found, step.stopwatch, Ranks())
    choosing.spent_seconds = first_use.BUDGET_SECONDS + 1
    assert choosing.choose(step.run) == {} and step.timed == 0
    assert "general tiles on NVIDIA H200" in capsys.readouterr().err
    assert choosing.choose(step.run) == {} and capsys.readouterr().err == "", "it is said once"
    monkeypatch.setattr(first_use, "COMPILING_SECONDS", -1.0)  # the first few alone are compiled
    step = Step(found, {A: 5, B: 2})
    chosen = FirstUse(found, step.stopwatch, Ranks()).choose(step.run)
    assert chosen == {A: candidates(A)[first_use.TURNS - 1], B: candidates(B)[2]}


def test_ranks_choose_alike_by_the_sum_of_their_times_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    """One rank is fastest with the third tile, the other, more markedly, with the sixth; threads stand for processes."""
    assert in_ranks([{A: 2}, {A: 5}], [1.0, 4.0]) == [{A: candidates(A)[5]}] * 2
    capsys.readouterr()
    assert in_ranks([{A: 2}, {B: 5}], [1.0, 1.0]) == [{}, {}]
    assert "the ranks have tiles of different shapes to choose" in capsys.readouterr().err


def in_ranks(bests: list[dict[Product, int]], weights: list[float]) -> list[dict[Product, Tile]]:
    barrier, told = threading.Barrier(len(bests), timeout=20), [[0.0]] * len(bests)
    chosen: list[dict[Product, Tile]] = [{A: Tile(1, 1, 1)}] * len(bests)

    def rank(i: int) -> None:
        def summed(numbers: Any) -> list[float]:
            told[i] = list(numbers)
            barrier.wait()
            total = [sum(column) for column in zip(*told, strict=True)]
            barrier.wait()
            return total

        found = Found(f"rank {i}")
        step = Step(found, bests[i])
        watch = step.stopwatch
        choosing = FirstUse(found, lambda run: scaled(watch(run), weights[i]), Ranks(summed))
        chosen[i] = choosing.choose(step.run)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(len(bests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return chosen


def scaled(timed: Callable[[], float], by: float) -> Callable[[], float]:
    return lambda: by * timed()


DAMAGED = {
    "empty": "",
    "half": '{"format": 1, "gpu": "NVIDIA H200", "tiles": [{"epilogue": "add", "out": 40',
    "a list": "[1, 2]",
    "another format": '{"format": 2, "gpu": "NVIDIA H200", "tiles": []}',
    "another GPU": '{"format": 1, "gpu": "NVIDIA L4", "tiles": []}',
    "no tile": '{"format": 1, "gpu": "NVIDIA H200", "tiles": [{"epilogue": "add"}]}',
    "bytes": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_or_foreign_file_is_ignored_with_a_line_and_then_replaced(
    tmp_path: Path, content: str | bytes
) -> None:
    file = tmp_path / "h200.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = Found("NVIDIA H200", file)
    with pytest.warns(UserWarning, match=r"h200.json holds no tiles of this GPU's and is ignored \(\w+: ") as told:
        assert found.of(A) is None
    assert all("\n" not in str(one.message) for one in told)
    with pytest.warns(UserWarning, match="is ignored"):
        found.keep({A: Tile(2, 4096, 8)})
    assert read(file, "NVIDIA H200") == {A: Tile(2, 4096, 8)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": 3},
        {"rows": "2"},
        {"columns": 1 << 20},
        {"warps": 64},
        {"blocks": 0},
        {"convert": "fast"},
        {"depth": 2},
        {"vector": 1},
    ],
    ids=str,
)
def test_a_tile_that_no_kernel_can_have_is_not_taken_from_a_file(wrong: dict[str, Any]) -> None:
    line = {**A._asdict(), "tile": {"rows": 2, "columns": 4096, "warps": 8}}
    assert entry(json.loads(json.dumps(line))) == (A, Tile(2, 4096, 8))
    line["tile"] |= wrong
    with pytest.raises((ValueError, TypeError)):
        entry(line)


def test_two_processes_that_keep_tiles_at_once_leave_a_whole_file_with_both(tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    one, other = Found("NVIDIA H200", file), Found("NVIDIA H200", file)
    assert one.of(A) is None and other.of(B) is None  # both have read an absent file
    one.keep({A: Tile(2, 4096, 8)})
    other.keep({B: Tile(4, 2048, 8, blocks=2, convert="offset")})
    assert read(file, "NVIDIA H200") == {A: Tile(2, 4096, 8), B: Tile(4, 2048, 8, blocks=2, convert="offset")}

    def keep(i: int) -> None:
        for _ in range(20):
            Found("NVIDIA H200", file).keep({A._replace(out=1000 + i): Tile(2, 4096, 8)})

    threads = [threading.Thread(target=keep, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert A in read(file, "NVIDIA H200"), "a reader finds a whole file at all times"
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"], "no drafts are left"


def test_a_cache_that_cannot_be_written_costs_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = Found("NVIDIA H200", tmp_path / "file" / "tiles.json")
    with pytest.warns(UserWarning) as told:
        found.keep({A: Tile(2, 4096, 8)})
    assert "the tiles that were found are not kept" in str(told[-1].message)
    assert found.of(A) == Tile(2, 4096, 8)


def test_what_ships_with_the_library_comes_before_what_was_found_here(tmp_path: Path) -> None:
    own, shipped = tmp_path / "own.json", tmp_path / "H200.json"
    write(own, {A: Tile(2, 4096, 8), B: Tile(2, 2048, 4)}, "NVIDIA H200")
    write(shipped, {A: Tile(4, 4096, 8)}, "H200")
    found = Found("NVIDIA H200", own, shipped)
    assert (found.of(A), found.of(B)) == (Tile(4, 4096, 8), Tile(2, 2048, 4))


def test_the_file_is_the_gpus_and_the_versions_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LLAMA_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = kept_in("NVIDIA H100 80GB HBM3")
    assert file.parent == tmp_path / "llama-fast" / "tiles"
    assert file.name.startswith(f"NVIDIA-H100-80GB-HBM3-torch-{torch.__version__}-triton-")
    assert kept_in("NVIDIA H200") != file
    assert found_tiles("cpu").file is None, "the interpreter keeps nothing"

"""Whatever the shape, the chosen tiles are ones the kernels can be compiled for."""

import itertools
import warnings
from types import SimpleNamespace

import pytest

from llama_fast.arithmetic.triton import check_card
from llama_fast.kernels.found import SWITCH
from llama_fast.kernels.tuning import (
    ONE_ROW,
    SHARDS,
    SHARED_BYTES,
    TWO_ROWS,
    attention_tile,
    fitting_stages,
    general_tile,
    linear_tile,
    measured_tile,
    next_power_of_2,
    untuned,
)


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "some other GPU"])
def test_linear_tiles_are_powers_of_two(gpu: str) -> None:
    shapes = {(n, k) for _, _, n, k, _ in ONE_ROW} | {(960, 576), (37, 20), (8192, 28672)}
    for epilogue, (n, k), m, itemsize in itertools.product(
        ("plain", "add", "gated", "rope"), shapes, (1, 2, 8), (1, 2, 4)
    ):
        tile = linear_tile(gpu, epilogue, n, k, m, itemsize)
        for size in (tile.rows, tile.columns, tile.warps, tile.slices):
            assert size == next_power_of_2(size), (epilogue, n, k, m, tile)
        assert tile.rows >= (2 if epilogue == "rope" else 1)  # rotary pairs stay in one block
        if m > 1 and not tile.vector:  # tensor cores
            assert tile.rows * (2 if epilogue == "gated" else 1) >= 16
            assert tile.columns // tile.slices >= 16 and tile.warps >= tile.slices


@pytest.mark.parametrize("m", [9, 16, 17, 32, 33, 64, 65, 128])
def test_tiles_of_many_rows_fit_the_kernels_and_the_memory_of_every_card(m: int) -> None:
    """Of eight-bit weights, which alone come to so many rows; of matrices smaller than a tile, too."""
    for epilogue, (n, k) in itertools.product(
        ("plain", "add", "gated", "rope"), ((40, 20), (576, 1536), (32000, 4096))
    ):
        tile = linear_tile("some other GPU", epilogue, n, k, m, 1)
        rows = tile.rows * (2 if epilogue == "gated" else 1)
        assert rows >= 16 and tile.columns <= max(16, next_power_of_2(k))
        for size in (tile.rows, tile.columns, tile.warps):
            assert size == next_power_of_2(size), (epilogue, n, k, m, tile)
        if tile.slices:
            assert tile.columns // tile.slices >= 16 and tile.warps >= tile.slices
        per_column = rows + 2 * max(8, next_power_of_2(m))
        assert fitting_stages(tile, per_column, SHARED_BYTES) * tile.columns * per_column <= SHARED_BYTES


def test_a_card_has_tiles_of_its_own_and_none_of_another_card() -> None:
    own, others = ("H200", "add", 4096, 11008, 1), ("H100", "add", 4096, 11008, 1)
    assert ONE_ROW[own] != ONE_ROW[others]
    assert linear_tile("NVIDIA H200", "add", 4096, 11008, 1, 1) == ONE_ROW[own]
    assert linear_tile("NVIDIA H100 80GB HBM3", "add", 4096, 11008, 1, 1) == ONE_ROW[others]
    only = ("H100", "rope", 12288, 4096, 1)
    for gpu in ("NVIDIA H200", "another"):
        assert measured_tile(gpu, "rope", 12288, 4096, 1, 1) is None
        assert linear_tile(gpu, "rope", 12288, 4096, 1, 1) == general_tile("rope", 12288, 4096, 1, 1) != ONE_ROW[only]
    shard = ("rope", 6144, 4096, 2)  # timed on an H200, which an H100 shares
    assert measured_tile("NVIDIA H200", *shard[:3], 1, 2) == SHARDS[shard] == ONE_ROW[("H100", *shard)]


def test_several_rows_of_a_measured_shape_have_the_rules_tile_and_two_rows_the_tables() -> None:
    h100 = "NVIDIA H100 80GB HBM3"
    for m in (2, 5, 8, 16):
        assert measured_tile(h100, "add", 4096, 4096, m, 1) == general_tile("add", 4096, 4096, m, 1)
        assert measured_tile(h100, "add", 4097, 4096, m, 1) is None
    assert measured_tile(h100, "add", 4096, 4096, 2, 2) == TWO_ROWS["H100", "add", 4096, 4096, 2]


def test_attention_splits_fit_the_scratch() -> None:
    for pairs, rows, slots in itertools.product((1, 3, 8, 32, 256), (1, 4, 7, 64), (64, 256, 1024, 131072)):
        for key_bytes in (128, 256, 1024):
            tile = attention_tile(pairs, rows, slots, key_bytes)
            assert 1 <= tile.splits <= 16 and tile.slots == next_power_of_2(tile.slots) <= tile.least
            assert 2 * tile.slots * tile.stages * key_bytes <= 65_536  # keys and values in shared memory


UNNAMED = ("NVIDIA L4", "NVIDIA L40S", "NVIDIA A10", "NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-40GB")


@pytest.mark.parametrize("gpu", UNNAMED)
def test_a_card_that_nobody_measured_has_general_tiles_and_one_line_says_so_once(
    gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert linear_tile(gpu, "add", 4096, 4096, 1, 2) == linear_tile("some other GPU", "add", 4096, 4096, 1, 2)
    properties = SimpleNamespace(name=gpu, major=8, minor=9)
    check_card(properties)  # whose tiles are found at first use
    monkeypatch.setenv(SWITCH, "0")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            check_card(properties)
    (one,) = told
    assert str(one.message) == untuned(gpu) and gpu in str(one.message) and "\n" not in str(one.message)


def test_a_measured_card_needs_no_word() -> None:
    for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA GH200 480GB"):
        assert untuned(gpu) is None
        check_card(SimpleNamespace(name=gpu, major=9, minor=0))


@pytest.mark.parametrize(
    ("gpu", "major", "minor"), [("Tesla T4", 7, 5), ("Tesla V100-SXM2-16GB", 7, 0), ("Tesla P100", 6, 0)]
)
def test_a_card_older_than_the_kernels_is_refused_by_name(gpu: str, major: int, minor: int) -> None:
    with pytest.raises(
        ValueError, match=rf"compute capability 8.0 or more, and {gpu} has {major}.{minor}: take Compiled"
    ):
        check_card(SimpleNamespace(name=gpu, major=major, minor=minor))

"""Whatever the shape, the chosen tiles are ones the kernels can be compiled for."""

import itertools

import pytest

from llama_fast.kernels.tuning import ONE_ROW, attention_tile, linear_tile, next_power_of_2


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


def test_a_card_has_its_own_tile_or_that_of_its_chip() -> None:
    own, chips = ("H200", "add", 4096, 11008, 1), ("H100", "add", 4096, 11008, 1)
    assert ONE_ROW[own] != ONE_ROW[chips]
    assert linear_tile("NVIDIA H200", "add", 4096, 11008, 1, 1) == ONE_ROW[own]
    assert linear_tile("NVIDIA H100 80GB HBM3", "add", 4096, 11008, 1, 1) == ONE_ROW[chips]
    shared = ("H100", "rope", 12288, 4096, 1)
    assert linear_tile("NVIDIA H200", "rope", 12288, 4096, 1, 1) == ONE_ROW[shared]
    assert linear_tile("another", "rope", 12288, 4096, 1, 1) != ONE_ROW[shared]


def test_attention_splits_fit_the_scratch() -> None:
    for pairs, rows, slots in itertools.product((1, 3, 8, 32, 256), (1, 4, 7, 64), (64, 256, 1024, 131072)):
        for key_bytes in (128, 256, 1024):
            tile = attention_tile(pairs, rows, slots, key_bytes)
            assert 1 <= tile.splits <= 16 and tile.slots == next_power_of_2(tile.slots) <= tile.least
            assert 2 * tile.slots * tile.stages * key_bytes <= 65_536  # keys and values in shared memory

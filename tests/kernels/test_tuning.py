"""Whatever the shape, the chosen tiles are ones the kernels can be compiled for."""

import itertools

import pytest

from llama_fast.kernels.tuning import MEASURED, attention_tile, linear_tile, next_power_of_2


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "some other GPU"])
def test_linear_tiles_are_powers_of_two(gpu: str) -> None:
    shapes = {(n, k) for _, _, n, k, _ in MEASURED} | {(960, 576), (37, 20), (8192, 28672)}
    for epilogue, (n, k), m, itemsize in itertools.product(
        ("plain", "add", "gated", "rope"), shapes, (1, 8), (1, 2, 4)
    ):
        tile = linear_tile(gpu, epilogue, n, k, m, itemsize)
        for size in (tile.rows, tile.columns, tile.warps):
            assert size == next_power_of_2(size), (epilogue, n, k, m, tile)
        assert tile.rows >= (2 if epilogue == "rope" else 1)  # rotary pairs stay in one block
        assert m == 1 or tile.rows * (2 if epilogue == "gated" else 1) >= 16  # tensor cores


def test_attention_splits_fit_the_scratch() -> None:
    for pairs, group, slots in itertools.product((1, 3, 8, 32, 256), (1, 4, 7), (64, 1024, 131072)):
        assert 1 <= attention_tile(pairs, group, slots).splits <= 16

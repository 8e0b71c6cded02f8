"""Rows side by side in tiles, and the loops over them. The loops are tried as they are written; one test compiles them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from llama_fast.compilers.compiled import CPU_OPTIONS
from llama_fast.encodings.int4 import Int4
from llama_fast.model.tiles import LANES, rows_of_tiles, sums_of_nibbles, tiled, untiled

pytestmark = pytest.mark.usefixtures("two_threads")
KINDS = [Int4(32), Int4(128), Int4(64, True), Int4(128, True)]


@given(st.integers(1, 50), st.integers(1, 7), st.integers(0, 2**31))
def test_tiles_hold_the_rows_and_zeros(rows: int, words: int, seed: int) -> None:
    part = torch.randint(-(2**31), 2**31 - 1, (rows, words), generator=torch.Generator().manual_seed(seed))
    tiles = tiled(part)
    assert tiles.shape == (-(-rows // LANES) * LANES, words) and tiles.is_contiguous()
    assert torch.equal(untiled(tiles)[:rows], part) and not untiled(tiles)[rows:].any()
    ids = torch.tensor([rows - 1, 0, rows // 2])
    assert torch.equal(rows_of_tiles(tiles, ids), part[ids])
    assert torch.equal(tiles.view(-1, words, LANES)[0, 0, : min(rows, LANES)], part[:LANES, 0]), "a word of 16 rows"


def parts_in_tiles(kind: Int4, rows: int, columns: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) + 0.1
    parts = kind.encode(weight, torch.float32)
    return {name: tiled(part) for name, part in parts.items()}, kind.decode(parts).double()


def inputs(rows: int, columns: int) -> torch.Tensor:
    """Unequal rows that do not stand around zero."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) + 2
    return x * torch.arange(1, rows + 1)[:, None]


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_loop_is_the_decoded_matrixs_product(kind: Int4) -> None:
    parts, decoded = parts_in_tiles(kind, 40, 384)
    for rows in (1, 3, 8):
        x = inputs(rows, 384)
        y = sums_of_nibbles(x, parts["weight"], parts["scale"], parts.get("zero"), kind.group)
        assert y.shape == (rows, 48) and y.dtype is torch.float32
        assert error(y[:, :40], x.double() @ decoded.T) < 1e-6
        assert not y[:, 40:].any(), "what fills the last tile up is zeros"


def test_compiled_it_is_one_loop_without_a_table_of_products() -> None:
    """Two unequal rows; a group of one chunk, and one of four with zeros. Nothing of the weights' size is stored."""
    from torch._inductor import inductor_prims  # noqa: F401 - as `Compiled` does

    kinds = [Int4(32), Int4(128, True)]
    stored, decoded = zip(*(parts_in_tiles(kind, 48, 256) for kind in kinds), strict=True)
    x = inputs(2, 256)

    def both(x: torch.Tensor, stored: tuple[dict[str, torch.Tensor], ...]) -> list[torch.Tensor]:
        return [
            sums_of_nibbles(x, parts["weight"], parts["scale"], parts.get("zero"), kind.group)
            for kind, parts in zip(kinds, stored, strict=True)
        ]

    options = {name: value for name, value in CPU_OPTIONS.items() if name != "guard_filter_fn"}
    with torch.no_grad():
        compiled = torch.compile(both, dynamic=False, fullgraph=True, options=options)
        found, code = run_and_get_code(compiled, x, stored)
    for y, exact in zip(found, decoded, strict=True):
        assert error(y, x.double() @ exact.T) < 5e-7
    assert "fmadd" in "".join(code)
    sizes = [
        int(line.split("((")[1].split(",")[0]) for line in "".join(code).splitlines() if "empty_strided_cpu((" in line
    ]
    assert sizes and max(sizes) <= x.numel(), sizes

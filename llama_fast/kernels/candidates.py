"""Tiles that may be the fastest for a product, the likeliest first: what won for the nearest shapes, and what looks like it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

from llama_fast.kernels.found import Product
from llama_fast.kernels.stored import storage_of_word
from llama_fast.kernels.tuning import (
    LONG_ROW,
    MANY_ROWS,
    ONE_ROW,
    TWO_ROWS,
    Storage,
    Tile,
    few_rows_tile,
    general_tile,
    many_rows_tile,
    next_power_of_2,
)

BYTES = {"int4": 0.5, "sparse": 1.125, "sparse_int8": 0.625, "fp8": 1.0}
"""Of a column, of weights that are stored as words of several."""
MOST_OF_ONE_ROW, MOST_OF_SEVERAL = 12, 6
NEAREST = 5
"""Of the candidates, those that won for other shapes."""
MOST_BLOCKS = 4
"""More take seconds to compile."""


def candidates(product: Product) -> list[Tile]:
    """The rule's tile, then others."""
    _, out, columns, rows, word, activations = product
    storage = storage_of_word(word)
    general = general_tile(product.epilogue, out, columns, rows, storage, activations)
    if rows == 1:
        near = itertools.islice((tile for tile in won_nearby(product, storage) if tile != general), NEAREST)
        found: Iterable[Tile] = itertools.chain([general], near, of_one_row(product.epilogue, out, columns, storage))
        most = MOST_OF_ONE_ROW
    else:
        found, most = itertools.chain([general], of_several(product, storage)), MOST_OF_SEVERAL
    if word != "int8" or activations != 2:
        found = (tile._replace(convert="plain") for tile in found)  # there is one way to widen them
    few_blocks = (tile for tile in found if tile.blocks <= MOST_BLOCKS)
    return list(itertools.islice(dict.fromkeys(few_blocks), most))


def won_nearby(product: Product, storage: Storage) -> Iterator[Tile]:
    """The tables' tiles for weights that are stored so, of the shapes most like it first, as this shape can have them."""

    def far(key: tuple[str, str, int, int, Storage]) -> float:
        _, epilogue, n, k, _ = key
        same = {epilogue, product.epilogue} <= {"add", "send"} or epilogue == product.epilogue
        return abs(math.log2(n / product.out)) / 2 + 2 * abs(math.log2(k / product.columns)) + (not same)

    for key in sorted((key for key in ONE_ROW if key[4] == storage), key=far):
        yield fitted(ONE_ROW[key], product)


def fitted(tile: Tile, product: Product) -> Tile:
    """The tile with columns that suit rows of this length, and rows that an epilogue's pairs need."""
    columns = min(columns_of(product.columns), key=lambda columns: abs(math.log2(columns / tile.columns)))
    return tile._replace(columns=columns, rows=max(2, tile.rows) if product.epilogue == "rope" else tile.rows)


def columns_of(k: int) -> list[int]:
    """Columns of a load: for every padded length of a row the largest that gives it, where a fifth at most is padding."""
    longest: dict[int, int] = {}
    for columns in (512, 1024, 2048, 4096):
        padded = -(-k // columns) * columns
        if columns <= next_power_of_2(k) and padded <= 1.2 * k:
            longest[padded] = columns
    return list(longest.values()) or [max(64, min(4096, next_power_of_2(k)))]


def of_one_row(epilogue: str, n: int, k: int, storage: Storage, ranks: int = 8) -> Iterator[Tile]:
    """Tiles whose threads each hold 24 to 192 bytes of weights a block (of narrow weights 8), the likeliest first.

    `ranks`: so many can be sent a tile's rows.
    """
    itemsize = BYTES[storage] if isinstance(storage, str) else storage
    sizes = columns_of(k)
    sizes = [*sizes, sizes[-1] // 2] if itemsize == 1 and sizes[-1] >= 1024 else sizes
    found = []
    for columns, rows, warps, blocks in itertools.product(
        sizes, (1, 2, 4, 8, 16), (2, 4, 8, 16), (1, 2, 4, 8) if itemsize < 1 else (1, 2)
    ):
        of_block = 2 * rows if epilogue == "gated" else rows
        padded = -(-k // columns) * columns
        a_thread = of_block * padded * itemsize / (32 * warps)
        if (epilogue == "rope" and rows < 2) or next_power_of_2(ranks) * rows > 32 * warps:
            continue
        if (
            (8 if itemsize < 1 else 24) <= a_thread <= 192
            and padded / (32 * warps) <= 64
            and 200 <= n / of_block / blocks <= 12_000
        ):
            far = abs(a_thread - 80) / 80 + abs(of_block * padded * itemsize - 16_384) / 32_768 + (padded - k) / k
            found.append((far, Tile(rows, columns, warps, blocks)))
    for _, tile in sorted(found, key=lambda pair: pair[0]):
        if storage in ("int4", "sparse_int8"):
            yield from (tile._replace(apart=apart) for apart in (False, True))
        elif storage == 1:
            yield from (tile._replace(convert=kind) for kind in ("offset", "exact"))
        else:
            yield tile


def of_several(product: Product, storage: Storage) -> Iterator[Tile]:
    """What the rule says of larger and smaller matrices, and what won with two rows."""
    epilogue, out, columns, rows, _, activations = product
    if isinstance(storage, str):
        general = general_tile(epilogue, out, columns, rows, storage, activations)
        if general.vector:
            yield from (general._replace(blocks=2), general._replace(warps=8), general._replace(warps=8, blocks=2))
        else:
            yield from (general._replace(stages=stages) for stages in (2, 4))
            yield from (
                general._replace(loads=2 if general.loads == 1 else general.loads // 2),
                general._replace(ahead=2 if general.ahead == 0 else 0),
            )
            if general.slices:
                double = {name: 2 * getattr(general, name) for name in ("columns", "slices", "warps")}
                yield general._replace(**double, stages=2)
        return
    assert isinstance(storage, int)
    if rows == 2 and storage == 2 == activations:
        yield from (fitted(tile, product) for tile in dict.fromkeys(TWO_ROWS.values()))
    for n, k in itertools.product((out, MANY_ROWS, MANY_ROWS - 1), (columns, LONG_ROW, LONG_ROW + 1)):
        if rows > 8:
            yield many_rows_tile(epilogue, n, columns, rows)
        else:
            tile = few_rows_tile(epilogue, n, k, storage, activations)
            columns_there = min(tile.columns, max(16, next_power_of_2(columns)))
            tile = tile._replace(columns=columns_there, slices=min(tile.slices, columns_there // 16))
            yield from (tile, tile._replace(rows=2 * tile.rows))

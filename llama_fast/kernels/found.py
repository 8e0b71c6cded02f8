"""Tiles of shapes that no table knows: where they are looked up, and the files they are kept in.

A file is JSON, one tile a line. Those in `tiles/` ship with the library, each for the card in its name; what is found at first
use (`first_use.py`) is kept in the user's cache, a file for each GPU, version of PyTorch and version of Triton.
"""

from __future__ import annotations

import functools
import json
import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from llama_fast.kernels.stored import Narrow, word_of
from llama_fast.kernels.tuning import Tile, card, next_power_of_2
from llama_ref.cache_folder import cache_folder

SHIPPED = Path(__file__).with_name("tiles")
FORMAT = 1
SWITCH = "LLAMA_FAST_FIND_TILES"
CONVERSIONS = ("plain", "exact", "offset")
LARGEST = 65_536
"""No number of a tile is larger."""


class Product(NamedTuple):
    """What a tile is for: a weight [out, columns] that is stored so, by a class of rows of activations of so many bytes each."""

    epilogue: str
    out: int
    columns: int
    rows: int
    storage: str
    activations: int

    def __str__(self) -> str:
        return f"{self.epilogue} {self.out} x {self.columns} {self.storage} of {self.rows} rows"


def product_of(epilogue: str, weight: torch.Tensor | Narrow, x: torch.Tensor) -> Product:
    (out, columns), rows = weight.shape, rows_class(x.shape[0])
    return Product(epilogue, out, columns, rows, word_of(weight), x.element_size())


def rows_class(rows: int) -> int:
    """The most rows that have the same tile: 1 -> 1, 2 -> 2, 3 -> 8, 9 -> 16."""
    return rows if rows <= 2 else max(8, next_power_of_2(rows))


class Found:
    """The tiles of one GPU that are not in the tables: files are read when the first is asked for."""

    def __init__(self, gpu: str, file: Path | None = None, shipped: Path | None = None):
        """`file`: where this machine keeps what it found; `shipped`: what the library brings for the card."""
        self.gpu, self.file, self._shipped = gpu, file, shipped
        self._trying: dict[Product, Tile] = {}
        self._known: dict[Product, Tile] | None = None
        self._unknown: dict[Product, None] | None = None

    @property
    def known(self) -> dict[Product, Tile]:
        if self._known is None:
            own = read(self.file, self.gpu) if self.file is not None and is_on() else {}
            self._known = own | (read(self._shipped) if self._shipped is not None else {})
        return self._known

    def of(self, product: Product) -> Tile | None:
        """Its tile, the one on trial before all others; None where nobody knows one."""
        tile = self._trying.get(product) or self.known.get(product)
        if tile is None and self._unknown is not None:
            self._unknown[product] = None
        return tile

    @contextmanager
    def asked(self) -> Iterator[Mapping[Product, None]]:
        """Inside, what `of` was asked for and did not know, in order."""
        self._unknown = unknown = dict[Product, None]()
        try:
            yield unknown
        finally:
            self._unknown = None

    @contextmanager
    def on_trial(self, tiles: Mapping[Product, Tile]) -> Iterator[None]:
        """Inside, these products have these tiles."""
        before, self._trying = self._trying, {**self._trying, **tiles}
        try:
            yield
        finally:
            self._trying = before

    def keep(self, tiles: Mapping[Product, Tile]) -> None:
        """From now on these are known, here and, if they can be written, in the file."""
        self.known.update(tiles)
        if self.file is None:
            return
        try:
            # read anew: another process may have added to it
            write(self.file, read(self.file, self.gpu) | dict(tiles), self.gpu)
        except OSError as error:
            warnings.warn(f"the tiles that were found are not kept: {error}", stacklevel=2)


@functools.cache
def found_tiles(gpu: str) -> Found:
    """This process's, of a GPU by its name; "cpu" is Triton's interpreter, and has no file."""
    name = card(gpu)
    shipped = None if name is None else SHIPPED / f"{name}.json"
    return Found(
        gpu, None if gpu == "cpu" else kept_in(gpu), shipped if shipped is not None and shipped.exists() else None
    )


def kept_in(gpu: str) -> Path:
    """The user's file for a GPU under this PyTorch and this Triton."""
    words = f"{gpu} torch {torch.__version__} triton {triton.__version__}"
    return cache_folder() / "tiles" / (re.sub(r"[^A-Za-z0-9.+]+", "-", words) + ".json")


def is_on() -> bool:
    """Whether tiles may be found at first use, and taken from the user's cache; ValueError for a switch that is neither 0 nor 1."""
    asked = os.environ.get(SWITCH, "1")
    if asked not in ("0", "1"):
        raise ValueError(f"{SWITCH}={asked!r} must be 1 (tiles of unknown shapes are found at first use) or 0")
    return asked == "1"


def read(file: Path, gpu: str | None = None) -> dict[Product, Tile]:
    """The tiles of a file, none where there is no file; of one that is damaged, or another GPU's than `gpu`, a warning says so."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or (gpu is not None and content["gpu"] != gpu):
            raise ValueError(f"format {content['format']!r} for {content['gpu']!r}, not {FORMAT} for {gpu!r}")
        return dict(entry(line) for line in content["tiles"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        warnings.warn(f"{file} holds no tiles of this GPU's and is ignored ({told})", stacklevel=2)
        return {}


def entry(line: Any) -> tuple[Product, Tile]:
    """A line of a file; ValueError, TypeError or KeyError for one that is no product and a tile that kernels can be compiled for."""
    fields = dict(line)
    tile = Tile(**fields.pop("tile"))
    product = Product(**fields)
    if any(type(value) is not type(default) for value, default in zip(tile, Tile(1, 1, 1))):
        raise TypeError(f"{tile} has fields of other types")
    powers = (tile.rows, tile.columns, tile.warps)
    counts = (*powers, tile.blocks, tile.stages, tile.slices, tile.ahead, tile.splits)
    if any(n != next_power_of_2(n) for n in powers) or not all(0 <= n <= LARGEST for n in counts):
        raise ValueError(f"{tile} has sizes that no kernel can have")
    if not (tile.warps <= 32 and tile.blocks and tile.stages and tile.splits and tile.convert in CONVERSIONS):
        raise ValueError(f"{tile} has settings that no kernel can have")
    if [type(value) for value in product] != [str, int, int, int, str, int]:
        raise TypeError(f"{product} has fields of other types")
    return product, tile


def write(file: Path, tiles: Mapping[Product, Tile], gpu: str) -> None:
    """All of them at once: a reader finds the old file or the new one, whoever else writes. Raises OSError."""
    lines = [json.dumps({**product._asdict(), "tile": differing(tile)}) for product, tile in sorted(tiles.items())]
    head = {"format": FORMAT, "gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}
    text = json.dumps(head)[:-1] + ', "tiles": [\n' + ",\n".join(lines) + "\n]}\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def differing(tile: Tile) -> dict[str, Any]:
    """A tile's fields but those that are at their defaults."""
    defaults: Callable[[str], Any] = Tile._field_defaults.get
    return {
        name: value
        for name, value in tile._asdict().items()
        if name not in Tile._field_defaults or value != defaults(name)
    }

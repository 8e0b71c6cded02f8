"""Other tools' quantised matrices as parts of our encodings: the file's own integers and scales, never widened to floats.

A reader describes a matrix as `Narrow`: integers with scales for groups of columns. `hold` chooses the encoding that holds them
exactly, and gives its parts as tensors that are read, and packed, a few rows at a time.

| integers | groups | encoding |
|---|---|---|
| up to 4 bits | dividing into 32 columns or more | int4, int4-g64, int4-g32; "-zero" with zero points |
| up to 8 bits | a row | int8, int8-zero |
| up to 8 bits | dividing into 8 columns or more | int8-g16 and the like |
| e4m3 | a row, or dividing so | fp8, fp8-g128 and the like |

Groups may be divided, each part with the scale of the whole: so a short last group, and blocks of several rows, are exact too.
Where columns do not stand in the order of their groups ("desc_act"), the matrix is held sorted by group, "-order" is added to the
encoding's name, and the part `order` int32 [1, in] says which column each stored one is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.formats.packed_bits import NIBBLES, packed_nibbles
from llama_ref.weights import CheckpointError, Key, TensorSource, spans

Rows = Callable[[int, int], Tensor]
"""Rows start to stop - 1 of something, read from its file: [stop - start, ...]."""

E4M3 = torch.float8_e4m3fn
NIBBLE_MIDDLE, LARGEST_NIBBLE = 8, 15
WIDEST_INT4_GROUP, LEAST_INT4_GROUP, LEAST_GROUP = 128, 32, 8
NUMBERS_AT_ONCE = 4 << 20
"""Numbers of a matrix that are unpacked at once: few against a matrix, many against what a step costs."""


@dataclass(frozen=True, eq=False)
class Narrow:
    """A weight is (number - zero) * the scale of its column's group."""

    shape: tuple[int, int]
    bits: int
    """Of the integers: they lie in [-2^(bits - 1), 2^(bits - 1)). E4m3 numbers have 8."""
    numbers: Rows
    """Int8 or e4m3 [rows, in]."""
    scale: Rows
    """Floats [rows, groups]."""
    scale_dtype: torch.dtype
    groups: int | Tensor
    """Columns of a group, the last of which may be short; or the group of each column, [in]."""
    zero: Rows | None = None
    """Int8 [rows, groups]."""
    floating: bool = False
    """Whether the numbers are e4m3."""


@dataclass(frozen=True, eq=False)
class PackedRows:
    """A part [out, width] of an encoded matrix over a file of another form: the rows asked for are read and packed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Rows
    columns: int
    """Numbers that are unpacked for a row."""

    def __getitem__(self, key: Key, /) -> Tensor:
        (start, stop), (left, right) = spans(key, self.shape)
        taken = torch.empty(stop - start, right - left, dtype=self.dtype)
        step = max(1, NUMBERS_AT_ONCE // max(1, self.columns))
        for row in range(start, stop, step):
            end = min(row + step, stop)
            taken[row - start : end - start] = self.read(row, end)[:, left:right]
        return taken


@dataclass(frozen=True, eq=False)
class Grouping:
    """Columns sorted by group, in equal groups that divide the file's: `of` [groups held] says of which group each is."""

    size: int
    of: Tensor
    order: Tensor | None


def hold(matrix: Narrow, where: str) -> tuple[str, dict[str, TensorSource]]:
    """(the name of the encoding, its parts); CheckpointError for groups that no encoding of ours holds."""
    out, columns = matrix.shape
    exact = grouping(matrix.groups, columns, where)
    name, size = encoding_for(matrix, exact, where)
    nibbles, order = name.startswith("int4"), exact.order
    of_group = exact.of.repeat_interleave(exact.size // size)
    repeated = not torch.equal(of_group, torch.arange(len(of_group)))

    def numbers(start: int, stop: int) -> Tensor:
        taken = matrix.numbers(start, stop)
        taken = taken if order is None else taken[:, order]
        return packed_nibbles(nibble(taken, where)) if nibbles else taken.contiguous()

    def scale(start: int, stop: int) -> Tensor:
        taken = matrix.scale(start, stop)
        return taken[:, of_group] if repeated else taken

    def zero(start: int, stop: int) -> Tensor:
        assert matrix.zero is not None
        taken = matrix.zero(start, stop)
        taken = taken[:, of_group] if repeated else taken
        return nibble(taken, where) if nibbles else taken

    def part(width: int, dtype: torch.dtype, read: Rows) -> PackedRows:
        return PackedRows((out, width), dtype, read, columns)

    kind = E4M3 if matrix.floating else torch.int8
    weight = part(columns // NIBBLES, torch.int32, numbers) if nibbles else part(columns, kind, numbers)
    parts: dict[str, TensorSource] = {"weight": weight, "scale": part(len(of_group), matrix.scale_dtype, scale)}
    if matrix.zero is not None:
        parts["zero"] = part(len(of_group), torch.uint8 if nibbles else torch.int8, zero)
    if order is not None:
        parts["order"] = order.to(torch.int32)[None]
    return name, parts


def encoding_for(matrix: Narrow, exact: Grouping, where: str) -> tuple[str, int]:
    """(the name of the narrowest encoding that holds a matrix, the columns of a group there)."""
    endings = ("-zero" if matrix.zero is not None else "") + ("" if exact.order is None else "-order")
    size = math.gcd(exact.size, WIDEST_INT4_GROUP)
    if matrix.bits <= 4 and not matrix.floating and size >= LEAST_INT4_GROUP:
        return "int4" + (f"-g{size}" if size != WIDEST_INT4_GROUP else "") + endings, size
    base, size = "fp8" if matrix.floating else "int8", exact.size
    if len(exact.of) == 1:
        return base + endings, size
    if size < LEAST_GROUP:
        raise CheckpointError(f"{where}: its groups divide into {size} columns; groups of fewer than 8 are not held")
    return f"{base}-g{size}{endings}", size


def nibble(numbers: Tensor, where: str) -> Tensor:
    """Integers of four bits as 0 to 15; CheckpointError where a wider type holds one that is none."""
    shifted = (numbers + NIBBLE_MIDDLE).view(torch.uint8)  # what is below -8 becomes large
    if shifted.numel() and int(shifted.max()) > LARGEST_NIBBLE:
        raise CheckpointError(f"{where}: holds an integer outside of -8 to 7, where its config says 4 bits or fewer")
    return shifted


def grouping(groups: int | Tensor, columns: int, where: str) -> Grouping:
    """grouping(tensor([1, 0, 1, 0]), 4, "w") -> groups of 2 columns, of groups 0 and 1, in the order 1, 3, 0, 2."""
    if isinstance(groups, int):
        size = math.gcd(min(groups, columns), columns)
        return Grouping(size, torch.arange(0, columns, size) // groups, None)
    if len(groups) != columns:
        raise CheckpointError(f"{where}: names the groups of {len(groups)} columns, and has {columns}")
    order: Tensor | None = None
    if bool((groups.diff() < 0).any()):
        order = groups.argsort(stable=True)
        groups = groups[order]
    found, counts = groups.unique_consecutive(return_counts=True)
    size = math.gcd(*counts.tolist())
    return Grouping(size, found.long().repeat_interleave(counts // size), order)


def table_rows(source: TensorSource, out: int, block_rows: int = 1) -> Rows:
    """Rows of a table [out / block_rows, groups] as [rows, groups], one for each row of the matrix; of one number, repeated."""

    def read(start: int, stop: int) -> Tensor:
        if len(source.shape) != 2 or source.shape[0] == 1 != out:
            return source[tuple(slice(None) for _ in source.shape)].reshape(1, -1).expand(stop - start, -1)
        first = start // block_rows
        taken = source[first : -(-stop // block_rows)]
        if block_rows == 1:
            return taken
        return taken.repeat_interleave(block_rows, 0)[start - first * block_rows :][: stop - start]

    return read


def matrix_rows(source: TensorSource) -> Rows:
    """Rows of a matrix as it is stored."""
    return lambda start, stop: source[start:stop]


def vector_rows(source: TensorSource) -> Rows:
    """Rows of a vector [out] as [rows, 1]."""
    return lambda start, stop: source[start:stop][:, None]

"""Quantised GGUF tensors as they are stored: a row is a chain of blocks, and each field of these is read as a tensor of its own.

Nothing is decoded here: the bytes are those of the file, in another order. A block's fields, in the order of ggml's `block_q4_0`
and its like (ggml-common.h): "weight" the low bits of its numbers, "high" the others, "scale" and "offset" for the whole block,
"scales" for parts of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_ref.weights import CheckpointError, Key, spans

STRIPE_BYTES = 8 << 20
"""Bytes of a file that are mapped at once while one field is taken out of them."""

Field = tuple[str, torch.dtype, int]
"""A part's name, its type, and how many numbers of it a block has."""

HALF: Field = ("scale", torch.float16, 1)
OFFSET: Field = ("offset", torch.float16, 1)


def _bytes(name: str, count: int) -> Field:
    return name, torch.uint8, count


BLOCKS: Mapping[str, tuple[int, tuple[Field, ...]]] = {
    "f16": (1, (("weight", torch.float16, 1),)),
    "bf16": (1, (("weight", torch.bfloat16, 1),)),
    "q4_0": (32, (HALF, _bytes("weight", 16))),
    "q4_1": (32, (HALF, OFFSET, _bytes("weight", 16))),
    "q5_0": (32, (HALF, _bytes("high", 4), _bytes("weight", 16))),
    "q5_1": (32, (HALF, OFFSET, _bytes("high", 4), _bytes("weight", 16))),
    "q8_0": (32, (HALF, ("weight", torch.int8, 32))),
    "q2_k": (256, (_bytes("scales", 16), _bytes("weight", 64), HALF, OFFSET)),
    "q3_k": (256, (_bytes("high", 32), _bytes("weight", 64), _bytes("scales", 12), HALF)),
    "q4_k": (256, (HALF, OFFSET, _bytes("scales", 12), _bytes("weight", 128))),
    "q5_k": (256, (HALF, OFFSET, _bytes("scales", 12), _bytes("high", 32), _bytes("weight", 128))),
    "q6_k": (256, (_bytes("weight", 128), _bytes("high", 64), ("scales", torch.int8, 16), HALF)),
    "iq4_nl": (32, (HALF, _bytes("weight", 16))),
    "iq4_xs": (256, (HALF, _bytes("high", 2), _bytes("scales", 4), _bytes("weight", 128))),
    "mxfp4": (32, (_bytes("scale", 1), _bytes("weight", 16))),
}
"""By the type's name in small letters: columns of a block, and its fields in the order in which they lie in the file."""


def block_bytes(kind: str) -> int:
    """Bytes of one block: "q4_0" -> 18."""
    return sum(dtype.itemsize * count for _, dtype, count in BLOCKS[kind][1])


@dataclass(frozen=True, eq=False)
class BlockField:
    """One field of all blocks of a tensor, [rows, blocks of a row x numbers of a block].

    Only the rows asked for are read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    offset_bytes: int
    block_bytes: int
    within: slice
    """Which bytes of a block."""

    def __getitem__(self, key: Key, /) -> torch.Tensor:
        (first, stop), (left, right) = spans(key, self.shape)
        width = self.within.stop - self.within.start
        blocks = self.shape[1] * self.dtype.itemsize // width
        row_bytes = blocks * self.block_bytes
        taken = torch.empty(stop - first, blocks, width, dtype=torch.uint8)
        rows = max(1, STRIPE_BYTES // max(1, row_bytes))
        for row in range(first, stop, rows):
            count = min(rows, stop - row)
            stripe = mapped(self.path, self.offset_bytes + row * row_bytes, (count, blocks, self.block_bytes))
            taken[row - first : row - first + count].numpy()[:] = stripe[..., self.within]
        whole = taken.flatten(1).view(self.dtype)
        return whole if (left, right) == (0, self.shape[1]) else whole[:, left:right].contiguous()


def mapped(path: Path, start: int, shape: tuple[int, ...]) -> Any:
    """Some bytes of a file as an array uint8, to be copied from at once; CheckpointError where the file has got shorter.

    Only these are mapped, and only as long as the array lives: pages of a mapping count as this process's memory, and buffers to
    read into would stay with the allocator.
    """
    import numpy

    try:
        return numpy.memmap(path, numpy.uint8, "r", start, shape)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as it could when it was opened ({error})") from error


def block_fields(kind: str, shape: tuple[int, int], path: Path, offset_bytes: int) -> dict[str, BlockField]:
    """The parts of a tensor [out, in] whose blocks begin at a byte of a file: {"scale": [out, in / 32], "weight": ...}."""
    columns, fields = BLOCKS[kind]
    found, at = {}, 0
    for name, dtype, count in fields:
        end = at + dtype.itemsize * count
        field = (shape[0], shape[1] // columns * count), dtype, path, offset_bytes, block_bytes(kind), slice(at, end)
        found[name] = BlockField(*field)
        at = end
    return found

"""GPTQ: columns packed along the input, zero points along the output, as AutoGPTQ and gptqmodel store them.

| tensor | shape | what it holds |
|---|---|---|
| `qweight` | int32 [in * bits / 32, out] | the numbers of a column of words, a stream of bits from the lowest |
| `qzeros` | int32 [groups, out * bits / 32] | zero points, in "gptq" (v1) less one |
| `scales` | [groups, out] | float16 |
| `g_idx` | int32 [in] | each column's group; with `desc_act` in any order |

How many bits a layer has is told by its shapes, so rules for single layers ("dynamic") need no reading. What v1 takes off the
zero points it takes off the words, as gptqmodel does when it loads a model: a stored zero point of 15 is one of 0 that borrowed
from its neighbour. Zero points that are all the middle are not held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ref.formats.fields import flag, whole, word
from llama_ref.formats.narrow import Narrow, Rows
from llama_ref.formats.packed_bits import WORD_BITS, signed, stream_words, unpacked_stream
from llama_ref.formats.quantised import Quantised, refused, transposed
from llama_ref.weights import FLOATS, CheckpointError, TensorSource

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
ROWS_OF_WORDS = 32
"""Zero points of so many rows fill whole words, whatever their bits."""


def read(quantised: Quantised) -> dict[str, Narrow]:
    """The matrices that have a `qweight`; CheckpointError, or ValueError for a setting that is not supported."""
    settings = quantised.settings
    kind = word(settings, "checkpoint_format", word(settings, "format", "gptq"))
    if kind not in FORMATS:
        raise refused("checkpoint_format", kind)
    if word(settings, "pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise refused("pack_dtype", settings["pack_dtype"])
    if flag(settings, "is_marlin_format"):
        raise refused("is_marlin_format", True)
    return {module: _matrix(quantised, module, kind == "gptq") for module in quantised.modules_with("qweight")}


def _matrix(quantised: Quantised, module: str, first_version: bool) -> Narrow:
    out, columns = quantised.shapes[module]
    where = f"{quantised.directory}: {module}"
    words, groups = quantised.shape_of(module, "qweight", 2)[0], quantised.shape_of(module, "scales", 2)[0]
    bits = next((bits for bits in BITS if stream_words(columns, bits) == words), None)
    if bits is None:
        raise CheckpointError(f"{where}.qweight has {words} rows of words for {columns} columns: not 2, 3, 4 or 8 bits")
    weight = quantised.take(module, "qweight", (words, out), (torch.int32,))
    zeros = quantised.take(module, "qzeros", (groups, stream_words(out, bits)), (torch.int32,))
    scales = quantised.take(module, "scales", (groups, out), FLOATS)
    read_zero = _zeros(zeros, bits, out, first_version)
    middle = 1 << (bits - 1)

    def numbers(start: int, stop: int) -> Tensor:
        taken = weight[0:words, start:stop].t()
        return signed(unpacked_stream(taken, bits, columns), middle)

    settings = quantised.settings
    symmetric = flag(settings, "sym", True) and not bool(read_zero(0, out).any())
    return Narrow(
        (out, columns),
        bits,
        numbers,
        transposed(scales, groups),
        scales.dtype,
        _groups(quantised, module, groups),
        None if symmetric else read_zero,
    )


def _zeros(source: TensorSource, bits: int, out: int, first_version: bool) -> Rows:
    """Zero points less the middle, int8 [rows, groups]."""
    groups, width = source.shape
    middle = 1 << (bits - 1)
    ones = sum(1 << shift for shift in range(0, WORD_BITS, bits))

    def read(start: int, stop: int) -> Tensor:
        first = start // ROWS_OF_WORDS * ROWS_OF_WORDS
        last = min(-(-stop // ROWS_OF_WORDS) * ROWS_OF_WORDS, out)
        words = source[0:groups, first * bits // WORD_BITS : min(stream_words(last, bits), width)]
        if first_version and bits != 3:
            words = words + ones  # int32, which wraps
        zero = unpacked_stream(words, bits, last - first)
        if first_version and bits == 3:  # whose fields cross words
            zero = zero + 1 & 7
        return signed(zero, middle)[:, start - first : stop - first].t().contiguous()

    return read


def _groups(quantised: Quantised, module: str, groups: int) -> int | Tensor:
    """The columns of a group; where `g_idx` is stored, the group of each column."""
    columns = quantised.shapes[module][1]
    if f"{module}.g_idx" in quantised.stored:
        of_column = quantised.take(module, "g_idx", (columns,), (torch.int32, torch.int64))[:].long()
        if bool(((of_column < 0) | (of_column >= groups)).any()):
            raise CheckpointError(f"{quantised.directory}: {module}.g_idx names a group that is none of {groups}")
        return of_column
    if groups == 1:
        return columns
    settings = quantised.settings
    size = whole(settings, "group_size")
    if -(-columns // size) != groups:
        raise CheckpointError(
            f"{quantised.directory}: {module}.scales has {groups} groups, and {columns} columns have no such number of {size}"
        )
    return size

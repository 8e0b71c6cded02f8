"""AWQ ("gemm"): as GPTQ, but numbers and zero points are both packed along the output, in the order 0, 2, 4, 6, 1, 3, 5, 7.

`qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out]; a zero point is stored as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ref.formats.fields import whole, word
from llama_ref.formats.narrow import Narrow, Rows
from llama_ref.formats.packed_bits import NIBBLES, signed, unpacked_stream
from llama_ref.formats.quantised import Quantised, refused, transposed
from llama_ref.weights import FLOATS, CheckpointError, TensorSource

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word is the number of row 8 j + i."""
MIDDLE = 8


def read(quantised: Quantised) -> dict[str, Narrow]:
    """The matrices that have a `qweight`; CheckpointError, or ValueError for a setting that is not supported."""
    settings = quantised.settings
    for name in ("version", "format", "checkpoint_format"):
        kind = word(settings, name, "gemm")
        if kind != "gemm":
            raise refused(name, kind)
    if word(settings, "backend", "auto") == "llm-awq":  # words of 16 bits
        raise refused("backend", "llm-awq")
    if whole(settings, "bits", whole(settings, "w_bit", 4)) != 4:
        raise refused("bits", settings.get("bits", settings.get("w_bit")))
    return {module: _matrix(quantised, module) for module in quantised.modules_with("qweight")}


def _matrix(quantised: Quantised, module: str) -> Narrow:
    out, columns = quantised.shapes[module]
    groups = quantised.shape_of(module, "scales", 2)[0]
    if out % NIBBLES or not groups or columns % groups:
        raise CheckpointError(
            f"{quantised.directory}: {module} of {out} rows and {columns} columns in {groups} groups is no AWQ matrix"
        )
    weight = quantised.take(module, "qweight", (columns, out // NIBBLES), (torch.int32,))
    zeros = quantised.take(module, "qzeros", (groups, out // NIBBLES), (torch.int32,))
    scales = quantised.take(module, "scales", (groups, out), FLOATS)
    scale = transposed(scales, groups)
    return Narrow((out, columns), 4, _nibbles(weight), scale, scales.dtype, columns // groups, _nibbles(zeros))


def _nibbles(source: TensorSource) -> Rows:
    """The numbers less the middle, int8 [rows, columns], of words [columns, out / 8]."""
    columns = source.shape[0]

    def read(start: int, stop: int) -> Tensor:
        first, last = start // NIBBLES, -(-stop // NIBBLES)
        words = source[0:columns, first:last]
        number = signed(unpacked_stream(words, 4, (last - first) * NIBBLES), MIDDLE)
        rows: Tensor = number.unflatten(1, (-1, NIBBLES))[..., PLACES].flatten(1)
        return rows[:, start - first * NIBBLES : stop - first * NIBBLES].t().contiguous()

    return read

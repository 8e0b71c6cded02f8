"""Stored matrices as the kernels read them: a weight with a scale per row, or words that hold several weights.

An encoding says by its `loader` which of these its parts are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llama_fast.kernels.tuning import Storage

IN_GROUPS = ("int4", "fp8")
"""Kinds whose scales belong to groups of columns."""


class Narrow(NamedTuple):
    """A matrix [N, K] of which a column takes less than a byte, or that has scales of groups. `kind` and its parts: see
    `narrow._narrow`."""

    kind: str
    columns: int
    weight: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    places: Tensor | None = None
    group: int = 32

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.columns


def storage_of(weight: Tensor | Narrow) -> Storage:
    """The key of a weight in the tables of tiles."""
    return weight.kind if isinstance(weight, Narrow) else weight.element_size()


def group_of(weight: Tensor | Narrow) -> int:
    """Columns that share a scale, where they are less than a row; else 0."""
    return weight.group if isinstance(weight, Narrow) and weight.kind in IN_GROUPS else 0


def word_of(weight: Tensor | Narrow) -> str:
    """How a weight is stored, in a word that tells all kinds apart: "int8", "float8_e4m3fn", "int4-g128", "int4-g32-zero",
    "fp8-g128", "sparse"."""
    if not isinstance(weight, Narrow):
        return str(weight.dtype).removeprefix("torch.")
    return weight.kind + (f"-g{weight.group}" + "-zero" * (weight.zero is not None) if group_of(weight) else "")


def storage_of_word(word: str) -> Storage:
    """The tables' key of what `word_of` tells: "int4-g32" -> "int4", "int8" -> 1."""
    dtype = getattr(torch, word, None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else word.partition("-")[0]


def rows(parts: Mapping[str, Tensor]) -> tuple[Tensor | Narrow, Tensor | None]:
    """A weight [N, K] of one type, and a scale [N, 1] if it has one."""
    return parts["weight"], parts.get("scale")


def int4(parts: Mapping[str, Tensor]) -> tuple[Tensor | Narrow, Tensor | None]:
    """Words of eight columns, a scale for each group of columns, and perhaps a zero."""
    words, scale = parts["weight"], parts["scale"]
    columns = 8 * words.shape[1]
    return Narrow("int4", columns, words, scale, parts.get("zero"), group=columns // scale.shape[1]), None


def sparse24(parts: Mapping[str, Tensor]) -> tuple[Tensor | Narrow, Tensor | None]:
    """Two values of each four columns and words of their places; int8 values four to a word, and a scale [N, 1]."""
    values, scale = parts["weight"], parts.get("scale")
    kind, read = ("sparse", values) if scale is None else ("sparse_int8", values.view(torch.int32))
    return Narrow(kind, 2 * values.shape[1], read, places=parts["places"]), scale


def fp8_groups(parts: Mapping[str, Tensor]) -> tuple[Tensor | Narrow, Tensor | None]:
    """Numbers of a byte, and a scale for each group of columns."""
    numbers, scale = parts["weight"], parts["scale"]
    columns = numbers.shape[1]
    return Narrow("fp8", columns, numbers, scale, group=columns // scale.shape[1]), None


LOADERS: Mapping[str, Callable[[Mapping[str, Tensor]], tuple[Tensor | Narrow, Tensor | None]]] = {
    "rows": rows,
    "int4": int4,
    "sparse24": sparse24,
    "fp8_groups": fp8_groups,
}
"""The parts of an encoding with this `loader` as (weight, scale of its rows)."""

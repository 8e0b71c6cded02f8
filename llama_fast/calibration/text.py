"""A text as the rows of tokens that a model is calibrated on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS, LENGTH = 32, 512
"""16,384 tokens: the second moments of 1,536 inputs then have ten observations for each."""
LEAST_TOKENS = 128
CHARACTERS_A_TOKEN = 16
"""More than any text has, so that of a long text only the beginning is encoded."""


def calibration_rows(
    text: str, encode: Callable[[str], list[int]], rows: int = ROWS, length: int = LENGTH
) -> tuple[Tensor, str]:
    """The beginning of a text as tokens int64 [rows, length], and a notice if it has fewer rows than asked for, or "".

    ValueError for a text of less than LEAST_TOKENS tokens. What fills no row is left out.
    """
    ids = encode(text[: rows * length * CHARACTERS_A_TOKEN])[: rows * length]
    if len(ids) < LEAST_TOKENS:
        raise ValueError(f"the calibration text has {len(ids)} tokens: at least {LEAST_TOKENS} are needed")
    length = min(length, len(ids))
    found = len(ids) // length
    notice = ""
    if found < rows:
        notice = f"the calibration text gives {found} rows of {length} tokens where {rows} were asked for"
    return torch.tensor(ids[: found * length]).view(found, length), notice

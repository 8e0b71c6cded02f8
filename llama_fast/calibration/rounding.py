"""A matrix to the numbers of a grid: column by column, and if asked so that later columns answer the errors of earlier ones.

The feedback is that of GPTQ (Frantar et al., 2022), and for 2:4, where a column's error is that it was dropped, that of SparseGPT
(Frantar and Alistarh, 2023): an error is passed on to the columns that are still to be rounded, as the inverse of the second
moments says. Without it, 2:4 keeps what Wanda keeps (Sun et al., 2023): the largest |weight| * norm of the inputs.

Shapes: O outputs, I inputs, G columns of a group, C columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_fast.encodings.grid import Grid, Shared

BLOCK = 128
"""Columns after which errors are passed on to the rest of the matrix, by one product."""


def round_alone(weight_OI: Tensor, cost_I: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The parts of a matrix each of whose numbers goes to the nearest; what a group shares is what costs least."""
    rounded_OI, shared = torch.empty_like(weight_OI), []
    for first in range(0, weight_OI.shape[1], grid.columns):
        group = slice(first, first + grid.columns)
        shared.append(grid.share(weight_OI[:, group], cost_I[group]))
        rounded_OI[:, group] = grid.nearest(weight_OI[:, group], shared[-1])
    return grid.parts(rounded_OI, shared)


def round_with_feedback(weight_OI: Tensor, U_II: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The same where later columns answer earlier errors; U as `Moments.answers` gives it.

    What a group shares is found when its first column is reached, from what the weights are by then.
    """
    left_OI, rounded_OI = weight_OI.clone(), torch.empty_like(weight_OI)
    cost_I = U_II.diagonal().square().reciprocal()
    width = BLOCK // grid.columns * grid.columns or (grid.columns if grid.columns < weight_OI.shape[1] else BLOCK)
    shared: list[Shared] = []
    for first in range(0, weight_OI.shape[1], width):
        block = slice(first, first + width)
        U_CC, left_OC = U_II[block, block], left_OI[:, block]
        error_OC = torch.empty_like(left_OC)
        for c in range(left_OC.shape[1]):
            at = (first + c) % grid.columns
            if at == 0:
                group = slice(first + c, first + c + grid.columns)
                shared.append(grid.share(left_OI[:, group], cost_I[group]))
            rounded = grid.nearest(left_OC[:, c : c + 1], column_of(shared[-1], at))
            rounded_OI[:, first + c] = rounded[:, 0]
            error_OC[:, c] = (left_OC[:, c] - rounded[:, 0]) / U_CC[c, c]
            left_OC[:, c + 1 :] -= error_OC[:, c : c + 1] * U_CC[c, c + 1 :]
        left_OI[:, first + width :] -= error_OC @ U_II[block, first + width :]
    return grid.parts(rounded_OI, shared)


def column_of(shared: Shared, column: int) -> Shared:
    """What one column of a group has: the entry of its own where each has one, else that of all."""
    return tuple(part[:, column : column + 1] if part.shape[1] > 1 else part for part in shared)

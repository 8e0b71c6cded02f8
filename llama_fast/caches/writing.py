"""How new keys and values are put into their slots."""

from __future__ import annotations

import torch
from torch import Tensor


def write_at(slots_BKSd: Tensor, new_BTKd: Tensor, position_BT: Tensor) -> Tensor:
    """Put row b's token t into slot position_BT[b, t], in place; return the slots."""
    B, K = slots_BKSd.shape[:2]
    row_B11 = torch.arange(B, device=slots_BKSd.device)[:, None, None]
    head_K1 = torch.arange(K, device=slots_BKSd.device)[:, None]
    # All indices, on the tensor itself: a scatter, or an assignment through a transposed view, a compiler turns into a
    # copy of all slots.
    slots_BKSd[row_B11, head_K1, position_BT[:, None, :]] = new_BTKd.transpose(1, 2)
    return slots_BKSd

"""Attention over cached keys and values: PyTorch's own, and for a token on a CPU, sums that a compiler makes loops of.

Shapes: B batch, T tokens, S cache slots, H query heads, K key/value heads, G query heads of each of them, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.model.matvec import kept

FEW_SLOTS = 1024
"""Slots of all rows up to which a call of PyTorch's attention costs more than its work: 36 us for 256, with loops 10."""


def visible(position_BT: Tensor, slots: int, window: int | None) -> Tensor:
    """Which of the cache's slots the tokens at these positions see, [B, T, S]."""
    slot_S = torch.arange(slots, device=position_BT.device)
    mask_BTS = slot_S <= position_BT[:, :, None]
    if window is not None:
        mask_BTS &= slot_S > position_BT[:, :, None] - window
    return mask_BTS


def attend(q_BTHd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, mask_B1TS: Tensor | None) -> Tensor:
    """Attention of H query heads over K shared key/value heads: [B, T, H, d]. A mask of None: causal among these T tokens."""
    B, T, H, d = q_BTHd.shape
    _, K, S, _ = k_BKSd.shape
    if mask_B1TS is not None and T == 1:
        # The heads of a group are rows of one product: keys are read once, not G times.
        q_BKGd = q_BTHd.view(B, K, H // K, d)
        if q_BTHd.device.type == "cpu" and torch.compiler.is_compiling() and B * S <= FEW_SLOTS:
            return attend_by_sums(q_BKGd, k_BKSd, v_BKSd, mask_B1TS).view(B, T, H, d)
        return F.scaled_dot_product_attention(q_BKGd, k_BKSd, v_BKSd, attn_mask=mask_B1TS).reshape(B, T, H, d)
    q_BHTd = q_BTHd.transpose(1, 2)
    grouped = {"enable_gqa": True} if K != H else {}  # a branch, since a compiler's sizes may be symbols
    a_BHTd: Tensor = F.scaled_dot_product_attention(
        q_BHTd, k_BKSd, v_BKSd, attn_mask=mask_B1TS, is_causal=mask_B1TS is None, **grouped
    )
    return a_BHTd.transpose(1, 2)


def attend_by_sums(q_BKGd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, mask_B11S: Tensor) -> Tensor:
    """One token's attention [B, K, G, d], in float32 and rounded once.

    The heads of a group are sums of one loop, so a key is read once.
    """
    k_BKSd, v_BKSd = k_BKSd.float(), v_BKSd.float()
    rows_BKd = kept(q_BKGd.float()).unbind(2)
    score_BKGS = torch.stack([(q_BKd[:, :, None] * k_BKSd).sum(-1) for q_BKd in rows_BKd], 2) * q_BKGd.shape[-1] ** -0.5
    share_BKGS = kept(score_BKGS.masked_fill(~mask_B11S, -torch.inf).softmax(-1))
    a_BKGd = torch.stack([(share_BKS[..., None] * v_BKSd).sum(-2) for share_BKS in share_BKGS.unbind(2)], 2)
    return a_BKGd.type_as(q_BKGd)

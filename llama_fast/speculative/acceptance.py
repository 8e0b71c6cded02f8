"""Which proposed tokens stand: the rule that makes speculation exact. Pure functions of tensors, one row a sequence.

Speculative sampling (Leviathan et al. 2023, Chen et al. 2023). A token d proposed with probability q(d) stands if u q(d) < p(d),
where p is the target's probability. The first that falls is replaced by a draw from max(0, p - q), and nothing after
it counts; if all stand, one more token is drawn from the target for nothing. Each emitted token then has the target's
distribution, whatever q is. Greedy decoding is no limit of a softmax: there a token stands if it is the target's argmax.

Shapes: B rows, K proposed tokens, T = K + 1 positions of the target, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.engine.sampling import draw


def accept(draft_BK: Tensor, q_BKV: Tensor, p_BTV: Tensor, u_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [B, T], count [B]): row b emits tokens[b, :count[b]], at least one; what follows in the row means nothing.

    q[b, i] is the distribution that draft[b, i] was drawn from, p[b, i] the target's at the same place, p[b, K] the one
    after all of them. u in [0, 1): the first K judge the proposals, the last draws the token after them.
    """
    B, K = draft_BK.shape
    q_BK = q_BKV.gather(-1, draft_BK[..., None])[..., 0]
    p_BK = p_BTV[:, :K].gather(-1, draft_BK[..., None])[..., 0]
    n_B = leading(u_BT[:, :K] * q_BK < p_BK)
    row_B = torch.arange(B, device=n_B.device)
    p_BV = p_BTV[row_B, n_B]
    q_BV = F.pad(q_BKV, (0, 0, 0, 1))[row_B, n_B]  # after all K nothing was proposed: q = 0
    rest_BV = (p_BV - q_BV).clamp(min=0)
    # Rounding alone can make a token fall where p = q to the last digit but one; then nothing is left to draw from.
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)
    return emitted(draft_BK, n_B, draw(rest_BV, u_BT[:, K])), n_B + 1


def accept_greedy(draft_BK: Tensor, best_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The same at temperature 0: `best` is the target's argmax at each place. [[5, 6, 7]], [[5, 6, 1, 2]] -> [5, 6, 1]."""
    n_B = leading(draft_BK == best_BT[:, :-1])
    return emitted(draft_BK, n_B, best_BT.gather(-1, n_B[:, None])[:, 0]), n_B + 1


def leading(stands_BK: Tensor) -> Tensor:
    """How many stand before the first that does not: [yes, yes, no, yes] -> 2."""
    return stands_BK.long().cumprod(-1).sum(-1)


def emitted(draft_BK: Tensor, n_B: Tensor, last_B: Tensor) -> Tensor:
    """The n first proposals and the token after them, repeated to the end of the row."""
    place_T = torch.arange(draft_BK.shape[1] + 1, device=n_B.device)
    return torch.where(place_T < n_B[:, None], F.pad(draft_BK, (0, 1)), last_B[:, None])

"""One check on the device: the window of tokens it takes, which proposals stand after it, and how a row steps on.

Everything here has shapes that do not depend on how much is accepted.

Shapes: B rows, K proposed tokens, T = K + 1, L columns of history, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_fast.engine.sampling import BatchSampler
from llama_fast.speculative.acceptance import accept, accept_greedy

JUDGE, LAST = 2, 3
"""Streams of uniforms: whether a proposal stands, and the token after those that do. (0 is plain choice, 1 the draft's.)"""


@dataclass(frozen=True)
class State:
    """Rows under way. The newest token of row b is history[b, position[b]]; it is not yet in any cache.

    A row without a request stands at position 1, which is also its limit: there is a token before it, as everywhere.
    """

    history_BL: Tensor
    position_B: Tensor
    limit_B: Tensor  # the position of the last token that a row may have

    @classmethod
    def of_free_rows(cls, rows: int, columns: int, device: torch.device) -> State:
        """Rows without requests, each with room for so many tokens."""
        history_BL = torch.zeros(rows, columns, dtype=torch.int64, device=device)
        return cls(history_BL, torch.ones_like(history_BL[:, 0]), torch.ones_like(history_BL[:, 0]))

    @property
    def columns(self) -> int:
        """Tokens that a row has room for."""
        return self.history_BL.shape[1]

    def rows(self, first: int, count: int) -> State:
        """Some of the rows: what is written there is written here."""
        part = slice(first, first + count)
        return State(self.history_BL[part], self.position_B[part], self.limit_B[part])

    def stand(self, position_B: Tensor) -> None:
        """No row goes on from these positions, one of each row, in place."""
        self.position_B.copy_(position_B)
        self.limit_B.copy_(position_B)

    def free(self, row_N: Tensor) -> None:
        """These rows have no requests any more, in place."""
        self.position_B.index_fill_(0, row_N, 1)
        self.limit_B.index_fill_(0, row_N, 1)

    def begin(self, token_B: Tensor, lengths_B: Tensor, news_B: Tensor) -> None:
        """Every row has its prompt in its history, so long, its first token, and may have so many new ones; in place."""
        self.history_BL.scatter_(1, lengths_B[:, None], token_B[:, None])
        self.position_B.copy_(lengths_B)
        self.limit_B.copy_(lengths_B + news_B - 1)

    def clone(self) -> State:
        return State(self.history_BL.clone(), self.position_B.clone(), self.limit_B)

    def append(self, token_B: Tensor) -> None:
        """One token for every row that still wants one, in place. A row that has all it wants stays where it is."""
        self.history_BL.scatter_(1, self.position_B[:, None] + 1, token_B[:, None])
        self.position_B.add_(self.position_B < self.limit_B)

    def newest(self, count: int) -> Tensor:
        """The last `count` tokens of every row, [B, count]."""
        back_N = torch.arange(count - 1, -1, -1, device=self.position_B.device)
        return self.history_BL.gather(1, self.position_B[:, None] - back_N)


def aligned(history_BL: Tensor, position_B: Tensor, draft_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The check whose windows are the same whatever was proposed: (tokens [B, T], start [B], row of the newest token [B]).

    Position p is computed in row p % T of the window that starts at p - p % T. With T = 4, the newest token at position 6
    and proposals x y z, the window is position 4 to 7: the tokens of 4, 5 and 6, and x.
    """
    K = draft_BK.shape[1]
    row_B = position_B % (K + 1)
    start_B = position_B - row_B
    step_T = torch.arange(K + 1, device=position_B.device)
    proposed_BL = history_BL.scatter(1, position_B[:, None] + 1 + step_T[:K], draft_BK)
    return proposed_BL.gather(1, start_B[:, None] + step_T), start_B, row_B


def within(row_B: Tensor, draft_BK: Tensor, logits_BTV: Tensor) -> tuple[Tensor, Tensor]:
    """What an aligned check says of the newest token and after: proposals beyond its window are -1, which no argmax is."""
    B, K = draft_BK.shape
    step_T = torch.arange(K + 1, device=row_B.device)
    seen_BK = torch.where(step_T[:K] < K - row_B[:, None], draft_BK, -1)
    at_BT = (row_B[:, None] + step_T).clamp(max=K)
    return seen_BK, logits_BTV[torch.arange(B, device=row_B.device)[:, None], at_BT]


def finish(choose: BatchSampler, draft_BK: Tensor, q_BKV: Tensor | None, logits_BTV: Tensor, state: State) -> Tensor:
    """Accept, write the history, step on; in place. Returns [B, 2 + T]: tokens taken, proposals that stood, the tokens."""
    K = draft_BK.shape[1]
    history_BL, position_B, limit_B = state.history_BL, state.position_B, state.limit_B
    step_T = torch.arange(K + 1, device=position_B.device)
    if choose.greedy:
        tokens_BT, count_B = accept_greedy(draft_BK, logits_BTV.argmax(-1))
    else:
        p_BTV = choose.probabilities(logits_BTV)
        if q_BKV is None:
            q_BKV = torch.zeros_like(p_BTV[:, :K]).scatter(-1, draft_BK[..., None], 1.0)
        last_T = step_T == K  # drawn for the newest token's place, as the next place depends on what stands
        stream_T = torch.where(last_T, LAST, JUDGE)
        u_BT = choose.uniforms(position_B[:, None] + torch.where(last_T, 0, 1 + step_T), stream_T)
        tokens_BT, count_B = accept(draft_BK, q_BKV, p_BTV, u_BT)
    taken_B = torch.minimum(count_B, limit_B - position_B)
    at_BT = position_B[:, None] + 1 + step_T
    written_BT = torch.where(step_T < taken_B[:, None], tokens_BT, history_BL.gather(1, at_BT))
    history_BL.scatter_(1, at_BT, written_BT)
    position_B.add_(taken_B)
    return torch.cat([taken_B[:, None], count_B[:, None] - 1, tokens_BT], 1)

"""Log-probabilities of chosen tokens, taken on the device and sent to the host along with the tokens.

They are the model's own, of softmax(logits): before any temperature, filter or penalty. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural log-probability, and those of the likeliest tokens at its place."""

    token: int
    logprob: float
    top: dict[int, float] = field(default_factory=dict)


class Logprobs:
    """What a generation fills in: `rows[b][i]` is the i-th new token of row b."""

    def __init__(self, rows: int, top: int = 0):
        """`top`: how many of the likeliest tokens to tell beside each."""
        if top < 0:
            raise ValueError(f"logprobs={top} must not be negative")
        self.top = top
        self.rows: list[list[TokenLogprob]] = [[] for _ in range(rows)]

    def columns(self, token_B1: Tensor, logits_BV: Tensor) -> Tensor:
        """Token, its log-probability, the likeliest tokens and theirs, in one float64 tensor that holds ids exactly."""
        logprob_BV = logits_BV.float().log_softmax(-1)
        likeliest = logprob_BV.topk(min(self.top, logprob_BV.shape[-1]), -1)
        columns = (token_B1, logprob_BV.gather(-1, token_B1), likeliest.indices, likeliest.values)
        return torch.cat([column.double() for column in columns], -1)

    def take(self, columns: Sequence[Sequence[float]], ended: Sequence[bool]) -> None:
        """A step's columns, as they arrived on the host; rows that have ended get nothing more."""
        for row, (token, logprob, *likeliest), done in zip(self.rows, columns, ended, strict=True):
            if not done:
                half = len(likeliest) // 2
                ids = [int(one) for one in likeliest[:half]]
                row.append(TokenLogprob(int(token), logprob, dict(zip(ids, likeliest[half:], strict=True))))

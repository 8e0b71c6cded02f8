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


def columns(token_B1: Tensor, logits_BV: Tensor, top: int) -> Tensor:
    """Token, its log-probability, the `top` likeliest tokens and theirs, in one float64 tensor that holds ids exactly."""
    logprob_BV = logits_BV.float().log_softmax(-1)
    likeliest = logprob_BV.topk(min(top, logprob_BV.shape[-1]), -1)
    parts = (token_B1, logprob_BV.gather(-1, token_B1), likeliest.indices, likeliest.values)
    return torch.cat([part.double() for part in parts], -1)


def told(column: Sequence[float], top: int) -> TokenLogprob:
    """A row's columns, as they arrived on the host, and of the likeliest tokens `top`."""
    token, logprob, *likeliest = column
    half = len(likeliest) // 2
    ids = [int(one) for one in likeliest[:half]]
    return TokenLogprob(int(token), logprob, dict(zip(ids[:top], likeliest[half:], strict=False)))

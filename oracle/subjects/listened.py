"""A runner that says aloud what it computes, so that a generation can be held against the logits its tokens came from.

Shapes: B rows, T tokens, V vocabulary, n new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llama_fast.contracts import KVCache
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import BatchSampler


@dataclass(frozen=True)
class Listened(Runner):
    """A runner that tells the logits [B, T, V] of every call, and the positions [B] of the first of their tokens."""

    on_logits: Callable[[Tensor, Tensor], None]

    def start(
        self, tokens_BT: Tensor, lengths_B: Tensor, cache: KVCache, choose: BatchSampler
    ) -> tuple[Tensor, Tensor]:
        token_B, logits_BV = super().start(tokens_BT, lengths_B, cache, choose)
        self.on_logits(lengths_B - 1, logits_BV[:, None])
        return token_B, logits_BV

    def step(self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: BatchSampler) -> tuple[Tensor, Tensor]:
        token_B, logits_BTV = super().step(tokens_BT, start_B, cache, choose)
        self.on_logits(start_B, logits_BTV)
        return token_B, logits_BTV


class Said:
    """What a runner said while some rows were generated together. Nothing waits for it: it is sorted when it is asked for."""

    def __init__(self, runner: Runner):
        held = {field.name: getattr(runner, field.name) for field in fields(Runner)}
        self.runner = Listened(**held, on_logits=self._keep)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def _keep(self, first_B: Tensor, logits_BTV: Tensor) -> None:
        """Copies: positions are counted on in place, and a CUDA graph overwrites its results."""
        self._kept.append((first_B.clone(), logits_BTV.clone()))

    def behind(self, row: int, prompt_tokens: int, n: int, checked: bool = False) -> Tensor:
        """The logits [n, V] of a row's new tokens; NaN for a token that none were computed for.

        Where several calls covered a position the first holds, as the slot of a row that has ended may go on to say anything; of
        tokens that were `checked` after they had been proposed the last, as the one before stood on tokens that were rejected.
        """
        logits_nV = torch.full_like(self._kept[0][1][row, :1], torch.nan).repeat(n, 1)
        told: set[int] = set()
        for first_B, logits_BTV in self._kept:
            for at, logits_V in enumerate(logits_BTV[row], int(first_B[row]) + 1 - prompt_tokens):
                if 0 <= at < n and (checked or at not in told):
                    logits_nV[at] = logits_V
                    told.add(at)
        return logits_nV

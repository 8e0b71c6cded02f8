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
from llama_fast.processes import Answer


@dataclass(frozen=True)
class Heard:
    """The logits [B, T, V] of a call, the number of the first of its rows, and the positions [B] of their first tokens."""

    first_row: int
    position_B: Tensor
    logits_BTV: Tensor


@dataclass(frozen=True)
class Listened(Runner):
    """A runner that tells the logits of every call."""

    on_logits: Callable[[Heard], None]

    def begin_prompt(
        self, tokens_BT: Tensor, where: tuple[Tensor | None, Tensor], cache: KVCache, choose: BatchSampler
    ) -> Answer:
        start_B, lengths_B = where
        last_B = lengths_B - 1 if start_B is None else start_B + lengths_B - 1
        return self._heard(super().begin_prompt(tokens_BT, where, cache, choose), choose.first, last_B)

    def begin_step(self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: BatchSampler) -> Answer:
        # a copy: positions are counted on in place
        return self._heard(super().begin_step(tokens_BT, start_B, cache, choose), choose.first, start_B.clone())

    def _heard(self, answer: Answer, first_row: int, position_B: Tensor) -> Answer:
        """The answer, told when it is looked for."""

        def told() -> tuple[Tensor, Tensor]:
            token_B, logits = answer()
            logits_BTV = logits[:, None] if logits.ndim == 2 else logits
            self.on_logits(Heard(first_row, position_B, logits_BTV.clone()))  # a CUDA graph overwrites its results
            return token_B, logits

        return told


class Said:
    """What a runner said while some rows were generated together. Nothing waits for it: it is sorted when it is asked for."""

    def __init__(self, runner: Runner):
        held = {field.name: getattr(runner, field.name) for field in fields(Runner)}
        self._heard: list[Heard] = []
        self.runner = Listened(**held, on_logits=self._heard.append)

    def behind(self, row: int, prompt_tokens: int, n: int, checked: bool = False) -> Tensor:
        """The logits [n, V] of a row's new tokens; NaN for a token that none were computed for.

        Where several calls covered a position the first holds, as the slot of a row that has ended may go on to say anything; of
        tokens that were `checked` after they had been proposed the last, as the one before stood on tokens that were rejected.
        """
        logits_nV = torch.full_like(self._heard[0].logits_BTV[0, :1], torch.nan).repeat(n, 1)
        told: set[int] = set()
        for heard in self._heard:
            of = row - heard.first_row
            if not 0 <= of < len(heard.position_B):
                continue  # of a model in stages some rows have a step of their own
            for at, logits_V in enumerate(heard.logits_BTV[of], int(heard.position_B[of]) + 1 - prompt_tokens):
                if 0 <= at < n and (checked or at not in told):
                    logits_nV[at] = logits_V
                    told.add(at)
        return logits_nV

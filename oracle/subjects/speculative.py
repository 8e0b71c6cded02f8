"""A `llama_fast` runner with a proposer before it, as a Subject.

What the target said at a position is taken from the last check that covered it: an earlier one may have stood on tokens that
were rejected.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor

from llama_fast.engine.generate import Generation, generate
from llama_fast.engine.runner import Runner
from llama_fast.engine.speculation import Speculation
from oracle.subjects.adapters import Rows
from oracle.subjects.fast import FastSubject


class Watched:
    """A runner that keeps what it said: `said[b][p]` are the logits [V] at position p of row b, the latest."""

    def __init__(self, runner: Runner, batch: int):
        self._runner = runner
        self.said: list[dict[int, Tensor]] = [{} for _ in range(batch)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def start(self, tokens_BT: Tensor, lengths_B: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        token_B, logits_BV = self._runner.start(tokens_BT, lengths_B, *arguments)
        for row, length, logits_V in zip(self.said, lengths_B.tolist(), logits_BV.clone(), strict=True):
            row[length - 1] = logits_V
        return token_B, logits_BV

    def step(self, tokens_BT: Tensor, start_B: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        at = start_B.tolist()
        token_B, logits_BTV = self._runner.step(tokens_BT, start_B, *arguments)
        for row, start, logits_TV in zip(self.said, at, logits_BTV.clone(), strict=True):
            row.update({start + t: logits_V for t, logits_V in enumerate(logits_TV)})
        return token_B, logits_BTV


class SpeculativeSubject(FastSubject):
    """A runner that decodes greedily with proposals; prefill and teacher-forced decoding are the plain runner's."""

    def __init__(self, runner: Runner, draft: Speculation, batch: int | None = None, cache_length: int | None = None):
        super().__init__(runner, batch, cache_length)
        self.draft = draft
        self.generations: list[Generation] = []

    def greedy(self, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
        found: list[tuple[list[int], Tensor]] = []
        for group, real in self._groups(prompts):
            watched = Watched(self.runner, len(group))
            done = self._generation(cast(Runner, watched), group, n)
            self.generations.append(done)
            for row, completion, said in list(zip(group, done.completions, watched.said, strict=True))[:real]:
                tokens = completion.tokens
                unsaid_V = torch.full_like(said[len(row) - 1], torch.nan)  # a token that no logits were computed for
                found.append((tokens, torch.stack([said.get(len(row) - 1 + i, unsaid_V) for i in range(len(tokens))])))
        return found

    def until(self, prompts: Rows, n: int, eos_ids: Collection[int]) -> list[tuple[list[int], str]]:
        found: list[tuple[list[int], str]] = []
        for group, real in self._groups(prompts):
            done = self._generation(self.runner, group, n, eos_ids)
            found += [(completion.tokens, completion.finish_reason) for completion in done.completions[:real]]
        return found

    def _generation(self, runner: Runner, group: Rows, n: int, eos_ids: Collection[int] = ()) -> Generation:
        """n tokens with proposals, in a cache with room for them."""
        needed = max(2, *(len(row) for row in group)) + n + self.draft.slack
        cache = self._cache(len(group), min(needed, runner.config.max_context))
        return generate(runner, group, n, eos_ids=eos_ids, cache=cache, draft=self.draft)

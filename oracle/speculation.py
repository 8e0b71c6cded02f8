"""Judge speculative decoding: its greedy tokens are the target's own, its logits those of plain decoding, up to rounding.

The subject is the target with a proposer before it. What the target said at a position is taken from the last check that
covered it: an earlier one may have stood on tokens that were rejected. So tokens and logits are judged together, by the
same rules as plain decoding: each token the argmax of the logits shown, each disagreement with truth a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from llama_fast.build import Runner
from llama_fast.generate import Generation, generate
from llama_fast.speculation import Speculation
from llama_ref.checkpoint import Checkpoint
from oracle.adapters import FastSubject, Rows
from oracle.cases import random_row
from oracle.compare import Verdict, empty
from oracle.judge import Bench
from oracle.verify import references


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
            needed = max(2, *(len(row) for row in group)) + n + self.draft.slack
            cache = self._cache(len(group), min(needed, self.runner.config.max_context))
            done = generate(cast(Runner, watched), group, n, cache=cache, draft=self.draft)
            self.generations.append(done)
            for row, completion, said in list(zip(group, done.completions, watched.said, strict=True))[:real]:
                tokens = completion.tokens
                unsaid_V = torch.full_like(said[len(row) - 1], torch.nan)  # a token that no logits were computed for
                found.append((tokens, torch.stack([said.get(len(row) - 1 + i, unsaid_V) for i in range(len(tokens))])))
        return found


def judge_speculation(
    runner: Runner,
    checkpoint: Checkpoint,
    draft: Speculation,
    prompts: Sequence[Sequence[int]] = (),
    new_tokens: int = 64,
    batch: int | None = None,
    cache_length: int | None = None,
) -> Verdict:
    """Greedy continuations of `prompts` (two random ones of unequal length by default) with `draft`, against truth."""
    config = checkpoint.config
    rows = [list(prompt) for prompt in prompts] or [list(random_row(config.vocab_size, n, n)) for n in (6, 11)]
    longest = max(map(len, rows))
    room = min(cache_length or config.max_context, config.max_context)
    new_tokens = min(new_tokens, room - longest - draft.slack)
    if new_tokens < 1:
        return empty("room", f"a cache of {room} leaves none after {longest} tokens and {draft.slack} proposals")
    truth, yardstick = references(runner, checkpoint)
    subject = SpeculativeSubject(runner, draft, batch, cache_length)
    return Bench(truth, yardstick).greedy(subject, rows, new_tokens)

"""A `llama_fast` runner with a proposer before it, as a Subject."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from llama_fast.engine.generate import Generation, generate
from llama_fast.engine.runner import Runner
from llama_fast.engine.speculation import Speculation
from oracle.subjects.adapters import Rows
from oracle.subjects.fast import FastSubject
from oracle.subjects.listened import Said


class SpeculativeSubject(FastSubject):
    """A runner that decodes greedily with proposals; prefill and teacher-forced decoding are the plain runner's."""

    def __init__(self, runner: Runner, draft: Speculation, batch: int | None = None, cache_length: int | None = None):
        super().__init__(runner, batch, cache_length)
        self.draft = draft
        self.generations: list[Generation] = []

    def greedy(self, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
        found: list[tuple[list[int], Tensor]] = []
        for group, real in self._groups(prompts):
            said = Said(self.runner)
            done = self._generation(said.runner, group, n)
            self.generations.append(done)
            for b, completion in enumerate(done.completions[:real]):
                tokens = completion.tokens
                found.append((tokens, said.behind(b, completion.prompt_tokens, len(tokens), checked=True)))
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

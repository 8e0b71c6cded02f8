"""Steps of a model in pipeline stages: rows go in groups, one behind another, so that every stage works on another group.

Unlike plain steps the next one is launched before the last one's tokens are there: they come from the last stage, while the first
already works for other rows. With G groups over S stages, t(n) a stage's time for n rows and h that of handing on, all of B rows
get a token in max(S, G) x (t(B / G) + h): G = S is best, and gains what t(B) is above t(B / S).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from llama_fast.contracts import KVCache
from llama_fast.engine.caches import part_of
from llama_fast.engine.request import Row
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import BatchSampler
from llama_fast.engine.steps import PlainSteps, Taken, most_told
from llama_fast.processes import Answer


@dataclass(frozen=True)
class Pass:
    """What is under way through the stages for the rows in the slots `part`; not `wanted` behind a part of a prompt."""

    part: slice
    choose: BatchSampler
    answer: Answer
    wanted: bool = True
    told: int | None = None


class GroupedSteps(PlainSteps):
    """One token for every row of a group in each step; the groups take turns.

    Whatever is under way for some slots is waited for before the next pass through any of them.
    """

    def __init__(self, runner: Runner, slots: Sequence[Row | None], cache: KVCache, length: int, keeps_prefixes: bool):
        super().__init__(runner, slots, cache, length, keeps_prefixes)
        B, line = len(slots), runner.plan.shard.line
        count = min(B, 1 if line is None else line.count)
        self.groups = [slice(B * g // count, B * (g + 1) // count) for g in range(count)]
        self.passes: deque[Pass] = deque()
        self.arrived = 0
        """Steps whose tokens are on their way to the host, which has not taken them."""

    def start(self, first: int, rows: Sequence[Row], most: int | None = None) -> None:
        self._settle(slice(first, first + len(rows)))
        super().start(first, rows, most)

    def _first_tokens(self, part: slice, rows: Sequence[Row], choose: BatchSampler, answer: Answer) -> None:
        told = most_told(self._expect(rows)) if rows else None
        self.passes.append(Pass(part, choose, answer, bool(rows), told))

    def is_due(self) -> bool:
        wanted = any(row is not None and row.due for row in self.slots)
        guided = any(row is not None and row.guide is not None for row in self.slots)
        ahead = 0 if guided else self.readback.depth + len(self.groups) - 1
        return wanted and len(self.under_way) <= ahead

    @property
    def next_slots(self) -> tuple[int, int]:
        """Of the next group of which a row is due."""
        part = next(
            (part for part in self.groups if any(row is not None and row.due for row in self.slots[part])), None
        )
        part = self.groups[0] if part is None else part
        return part.start, part.stop - part.start

    def launch(self) -> None:
        first, count = self.next_slots
        part, whole = slice(first, first + count), count == len(self.slots)
        self.groups = [group for group in self.groups if group != part] + [part]
        self._settle(part)
        self._tidy()
        cache = part_of(self.cache, first, count)
        choose = self.choose if whole else self.choose.rows(first, count)
        answer = self.runner.begin_step(self.token_B1[part], self.position_B[part], cache, choose)
        self.position_B[part].add_(self.onward_B[part])
        told = most_told(self._expect(self.slots[part]))
        self.passes.append(Pass(part, choose, answer, told=told))

    def take(self) -> Taken:
        while self.under_way and not self.arrived:
            self._settle_oldest()
        self.arrived -= bool(self.under_way)
        return super().take()

    def finish(self) -> None:
        """What is under way is waited for: other stages have sent it."""
        while self.passes:
            self._settle_oldest()
        self.arrived = 0
        super().finish()

    def _settle(self, part: slice) -> None:
        """Wait for what is under way through some of these slots, and for all that is older."""
        while any(one.part.start < part.stop and part.start < one.part.stop for one in self.passes):
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        one = self.passes.popleft()
        token_B, logits = one.answer()
        if one.wanted:
            self.token_B1[one.part] = token_B[:, None]
            one.choose.note(self.token_B1[one.part, 0])
            self._send(self.token_B1[one.part], logits if logits.ndim == 2 else logits[:, -1], one.told)
            self.arrived += 1

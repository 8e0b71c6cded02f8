"""A step of the engine: what is launched on the device for all slots at once, and what comes back. Here, a token for each.

The tokens, their positions and the next step's input stay on the device. The host reads what was chosen a few tokens later;
what was computed past a row's end is dropped. A free slot goes through every step too: it writes one position of its own, over
and over. Shapes: B slots, T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llama_fast.contracts import KVCache
from llama_fast.engine import logprobs
from llama_fast.engine.caches import part_of
from llama_fast.engine.logprobs import TokenLogprob
from llama_fast.engine.request import Row
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import BatchSampler
from llama_fast.engine.transfer import Readback, pad, upload
from llama_fast.processes import Answer

Taken = list[tuple[Row, list[tuple[int, TokenLogprob | None]]]]
"""The tokens that each row got from one step, in order."""


class Stepper(Protocol):
    """How rows go on: one token at a time, or several that were proposed. The engine says which rows stand in which slots."""

    def start(self, first: int, rows: Sequence[Row], most: int | None = None) -> None:
        """Read what rows that stand in the slots from the `first` on have not read; their first tokens are on their way.

        `most`: of one row, so many of its ids at most. Where others are left it gets no token.
        """

    def is_due(self) -> bool:
        """Whether another step is to be launched before the oldest under way is read."""

    @property
    def next_slots(self) -> tuple[int, int]:
        """The slots that the next step goes through: the first, and how many."""

    def launch(self) -> None:
        """A step of these slots."""

    def take(self) -> Taken:
        """Wait for the oldest step under way; what it brought to rows that have not ended. Nothing if there is none."""

    def leave(self, slot: int) -> None:
        """Nobody stands in this slot any more."""

    def drop(self, row: Row) -> None:
        """What is under way is not for this row."""

    def finish(self) -> None:
        """No row is left: what is still under way is not waited for."""


class Allowed:
    """Which tokens the grammars of slots allow next. It knows nothing of caches, which are to go with their steps."""

    def __init__(self, slots: Sequence[Row | None], vocab_size: int, device: torch.device):
        self.slots, self.vocab_size, self.device = slots, vocab_size, device

    def __call__(self, first: int, count: int) -> Tensor:
        """For `count` slots from the `first` on: a bit for each token, int32 [count, V / 32]; all, where there is no grammar.

        Called when a step's logits are on their way: on a GPU the host does this while they are computed.
        """
        words_NW = torch.full((count, -(-self.vocab_size // 32)), -1, dtype=torch.int32)
        for row, words_W in zip(self.slots[first : first + count], words_NW, strict=True):
            if row is not None and row.guide is not None:
                row.guide.allow(words_W)
        return upload(words_NW, self.device)


def are_read_by(rows: Sequence[Row], most: int | None) -> bool:
    """Whether nothing of these rows' prompts is left when so many of their ids are read. Only one row may be read in part."""
    last = most is None or all(len(row.ids) - row.read <= most for row in rows)
    assert last or len(rows) == 1
    return last


def begin_reading(
    runner: Runner, rows: Sequence[Row], most: int | None, cache: KVCache, choose: BatchSampler
) -> tuple[Answer, Tensor]:
    """Read what these rows have not read, so many ids at most, into a cache that is theirs.

    The answer is the next token [B] of each and its logits [B, V]; told beside is how many positions are read then [B].
    """
    news = [row.ids[row.read :][:most] for row in rows]
    starts = [row.read for row in rows]
    tokens_BT, lengths_B = pad(news, runner.device)
    start_B = upload(starts, runner.device) if any(starts) else None
    answer = runner.begin_prompt(tokens_BT, (start_B, lengths_B), cache, choose)
    for row, new in zip(rows, news, strict=True):
        row.read += len(new)
    return answer, lengths_B if start_B is None else start_B + lengths_B


class PlainSteps:
    """One token for every row in each step."""

    def __init__(self, runner: Runner, slots: Sequence[Row | None], cache: KVCache, length: int, keeps_prefixes: bool):
        """`slots`: the engine's own list. `length`: positions that a row may have."""
        device, B = runner.device, len(slots)
        self.runner, self.slots, self.cache, self.keeps_prefixes = runner, slots, cache, keeps_prefixes
        sampler = BatchSampler.of_free_rows(B, device, runner.config.vocab_size)
        self.choose = runner.prepared(sampler, length + 1)
        self.choose.allowed = Allowed(slots, runner.config.vocab_size, device)
        self.token_B1 = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.position_B = torch.zeros(B, dtype=torch.int64, device=device)
        self.onward_B = torch.zeros(B, dtype=torch.int64, device=device)
        """1 where a step moves a row on by a position, 0 where a slot is free."""
        self.left: list[int] = []
        """Slots that became free since the last step."""
        self.readback = Readback(device)
        self.under_way: deque[list[Row | None]] = deque()

    def start(self, first: int, rows: Sequence[Row], most: int | None = None) -> None:
        part, whole = slice(first, first + len(rows)), len(rows) == len(self.slots)
        last = are_read_by(rows, most)
        if last:
            settings, tokens = [row.request.sampling for row in rows], [row.tokens for row in rows]
            self.choose.set_rows(first, settings, [row.ids for row in rows], tokens)
        choose = self.choose if whole else self.choose.rows(first, len(rows))
        if not last:
            choose = self.runner.greedy(1)  # behind a part of a prompt no token is wanted
        cache = part_of(self.cache, first, len(rows))
        answer, reach_B = begin_reading(self.runner, rows, most, cache, choose)
        self.position_B[part] = reach_B  # where others take steps before a prompt is read on, it is written again
        self.onward_B[part] = int(last)
        self._first_tokens(part, rows if last else (), choose, answer)

    def _first_tokens(self, part: slice, rows: Sequence[Row], choose: BatchSampler, answer: Answer) -> None:
        """Have the first tokens of these rows, in the slots `part`, where they are looked for; none behind a part of a prompt."""
        if not rows:
            return
        token_B, logits_BV = answer()
        self.token_B1[part] = token_B[:, None]
        choose.note(self.token_B1[part, 0])
        self._report(self.token_B1[part], logits_BV, rows)

    @property
    def next_slots(self) -> tuple[int, int]:
        return 0, len(self.slots)

    def is_due(self) -> bool:
        if len(self.under_way) > self.readback.depth or not any(row is not None and row.due for row in self.slots):
            return False
        # what a grammar allows next depends on the token before, which the host must have read
        return not self.under_way or not any(row is not None and row.guide is not None for row in self.slots)

    def launch(self) -> None:
        self._tidy()
        token_B, logits_BTV = self.runner.step(self.token_B1, self.position_B, self.cache, self.choose)
        self.position_B.add_(self.onward_B)
        self.token_B1.copy_(token_B[:, None])  # a CUDA graph overwrites its outputs at the next replay
        self.choose.note(self.token_B1[:, 0])
        self._report(self.token_B1, logits_BTV[:, -1], self.slots)

    def _tidy(self) -> None:
        """Slots that became free since the last step are left where they are."""
        for slot in self.left:
            if self.slots[slot] is None:
                self.onward_B[slot] = 0
                if not self.keeps_prefixes:  # else it stays behind what the row left there
                    self.position_B[slot] = 0
        if self.left:
            self.choose.narrow()
            self.left.clear()

    def _report(self, token_B1: Tensor, logits_BV: Tensor, rows: Sequence[Row | None]) -> None:
        """Send to the host what was chosen for these rows."""
        self._send(token_B1, logits_BV, most_told(self._expect(rows)))

    def _expect(self, rows: Sequence[Row | None]) -> list[Row | None]:
        """Of these rows those that a step gives a token, which is then under way."""
        running = [row if row is not None and row.due else None for row in rows]
        self.under_way.append(running)
        for row in running:
            if row is not None:
                row.launched += 1
        return running

    def _send(self, token_B1: Tensor, logits_BV: Tensor, told: int | None) -> None:
        """Send tokens to the host, with log-probabilities of so many others; None: without any."""
        self.readback.push(token_B1 if told is None else logprobs.columns(token_B1, logits_BV, told))

    def take(self) -> Taken:
        if not self.under_way:
            return []
        taken: Taken = []
        for row, column in zip(self.under_way.popleft(), self.readback.pop(), strict=True):
            if row is not None and row.finish_reason is None:
                top = row.request.logprobs
                said = None if top is None else logprobs.told(column, top)
                taken.append((row, [(int(column[0]), said)]))
        return taken

    def leave(self, slot: int) -> None:
        self.choose.free_row(slot)
        self.left.append(slot)

    def drop(self, row: Row) -> None:
        for running in self.under_way:
            running[:] = [None if of is row else of for of in running]

    def finish(self) -> None:
        self.under_way.clear()
        self.readback = Readback(self.runner.device)


def most_told(rows: Sequence[Row | None]) -> int | None:
    """Of how many tokens a row at most is told log-probabilities; None: no row is told any."""
    tops = [row.request.logprobs for row in rows if row is not None and row.request.logprobs is not None]
    return max(tops) if tops else None

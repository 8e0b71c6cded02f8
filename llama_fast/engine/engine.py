"""The one loop that decodes. Requests join and leave at the border of two steps; each is answered as it would be alone.

    engine = Engine(runner, rows=8, length=512)
    ids = [engine.add(request) for request in requests]
    while engine.busy:
        for event in engine.step():
            ...

An engine has a fixed number of slots, each a row of one cache, so that compiled code and recorded graphs see one shape. A request
waits until there is room, first come first served; requests that find all slots free are read together. Of a long prompt a chunk
is read between two steps, so that others go on meanwhile. In a cache of pages a row may have to make way for older ones: it is
read again when there is room, and goes on where it was.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque

from llama_fast.contracts import KVCache
from llama_fast.engine.caches import check_cache
from llama_fast.engine.in_flight import GroupedSteps
from llama_fast.engine.request import Event, Request, Row, Writer, check_bias, check_request
from llama_fast.engine.room import Room, room_of
from llama_fast.engine.runner import Runner
from llama_fast.engine.speculation import Speculation, Statistics
from llama_fast.engine.steps import PlainSteps, Stepper
from llama_ref.arguments import made, whole


class Engine:
    """A runner, a cache of some rows, and the requests that are answered there."""

    def __init__(
        self,
        runner: Runner,
        rows: int,
        length: int,
        cache: KVCache | None = None,
        draft: Speculation | None = None,
        keeps_prefixes: bool = False,
        chunk: int | None = None,
    ):
        """`length`: positions that a request may have, prompt and answer. `cache`: one for `rows` rows, else it is allocated.

        `draft` proposes tokens that are checked several at a time; a cache is then to have `draft.slack` more positions.
        `keeps_prefixes`: of a prompt that begins as what its slot held before, only the rest is read; without a draft a cache
        of pages always does so, whichever slot it was. `chunk`: tokens of prompts that are read between two steps, None: all.
        """
        self.runner = made("runner", runner, "a Runner, as build() makes one", "start", "step", "allocate")
        self.length, self.draft = whole("length", length, 1), draft
        self.chunk = None if chunk is None else whole("chunk", chunk, 1)
        rows = whole("rows", rows, 1)
        if draft is not None:
            made("draft", draft, "who proposes tokens, as Draft(runner) or Ngram()", "begin", "slack")
            if keeps_prefixes:
                raise ValueError("keeps_prefixes: with a draft every prompt is read from its beginning")
        if cache is None:
            room = length if draft is None else max(length, min(length + draft.slack, runner.config.max_context))
            cache = runner.allocate(rows, room)
        self.cache = check_cache(cache, rows, length)
        self.slots: list[Row | None] = [None] * rows
        self.room: Room = room_of(cache, runner, keeps_prefixes, None if draft is None else draft.slack)
        rounds = None if draft is None else draft.begin(runner, self.slots, cache, length)
        plain = PlainSteps if runner.plan.shard.line is None else GroupedSteps
        self.steps: Stepper = rounds or plain(runner, self.slots, cache, length, self.room.keeps_slots)
        self.statistics: Statistics | None = None if rounds is None else rounds.statistics
        """What speculation did so far, with a draft."""
        self.reused_tokens = 0
        """Tokens of all prompts so far that were not read, because the cache held them."""
        self.pre_emptions = 0
        """How often a row has made way for an older one."""
        self._rows: dict[int, Row] = {}
        self._queue: deque[Row] = deque()
        self._numbers = itertools.count()
        self._reading: Row | None = None
        """The row whose prompt is read in part."""

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._rows)

    @property
    def free(self) -> int:
        """Slots that nobody stands in."""
        return self.slots.count(None)

    def add(self, request: Request, writer: Writer | None = None) -> int:
        """Have a request answered; its number, which its events bear. `writer` makes text of its tokens, and knows stop strings.

        ValueError, with the numbers, for what the model or this engine has no room for.
        """
        check_request(self.runner.config, [request.ids], request.max_new_tokens)
        check_bias(self.runner.config, request.sampling)
        if request.positions > self.length:
            raise ValueError(
                f"a prompt of {len(request.ids)} tokens and {request.max_new_tokens} new ones do not fit the "
                f"{self.length} positions of a row (max_new_tokens={request.max_new_tokens})"
            )
        if self.draft is not None:
            self.draft.check(self.runner, [request], self.cache.capacity)
        self.room.check(request)
        row = Row(next(self._numbers), request, writer)
        self._rows[row.id] = row
        self._queue.append(row)
        return row.id

    def step(self) -> list[Event]:
        """Let requests join, launch what is due, and wait for the oldest step under way: what came of it."""
        self._read()
        while self.steps.is_due() and self._make_room():
            self.room.look(*self.steps.next_slots)
            self.steps.launch()
            self._leave_launched()
        events = []
        for row, tokens in self.steps.take():
            for token, logprob in tokens:
                if not row.ended:
                    events.append(row.take(token, logprob))
            if row.ended:
                self._end(row)
        return events

    def cancel(self, id: int) -> bool:
        """Nobody wants this request any more. Its slot is free at once; False if it has ended already."""
        row = self._rows.get(id)
        if row is None:
            return False
        row.cancel()
        if row in self._queue:
            self._queue.remove(row)
        self._end(row)
        return True

    def close(self) -> None:
        """Cancel every request."""
        for id in list(self._rows):
            self.cancel(id)

    def answers(self, id: int) -> bool:
        """Whether this request has not ended."""
        return id in self._rows

    def kept(self, slot: int) -> list[int]:
        """The ids whose keys and values stand in a slot, where prefixes are kept."""
        return self.room.kept(slot)

    def _read(self) -> None:
        """Read the prompts of requests for which there is room, in all as many tokens as a chunk has."""
        if not self._queue and self._reading is None:
            return
        left = self.chunk or sys.maxsize
        while left > 0:
            rows = self._admitted(left) if self._reading is None else [self._reading]
            if not rows:
                break
            first, before = rows[0].slot, sum(row.read for row in rows)
            assert first is not None
            self._reading = rows[0] if len(rows) == 1 else None
            self.room.look(first, len(rows))
            self.steps.start(first, rows, left if self._reading is not None and self.chunk is not None else None)
            if not rows[0].reading:
                self._reading = None
            for row in rows:
                self.room.learn(row)
            left -= sum(row.read for row in rows) - before
        self._leave_launched()

    def _admitted(self, left: int) -> list[Row]:
        """The next row that there is room for, or rows that find all slots free and may be read together."""
        free = [slot for slot, row in enumerate(self.slots) if row is None]
        alone = len(free) == len(self.slots)
        joined: list[Row] = []
        for slot in free:
            if not self._queue or (joined and (not alone or joined[0].held)):
                break
            row = self._queue[0]
            if joined and sum(len(other.ids) for other in joined) + len(row.ids) > left:
                break
            if not self.room.take(slot, row, joined):
                break
            self._queue.popleft()
            row.slot, row.read, self.slots[slot] = slot, row.held, row
            self.reused_tokens += 0 if row.made_way else row.held
            joined.append(row)
        return joined

    def _make_room(self) -> bool:
        """Room for the next token of each row; where there is none, the youngest makes way. False if no row is left to step."""
        due = [row for row in self.slots if row is not None and row.due]
        short = self.room.short(due)
        for row in sorted(short, key=lambda row: row.id):
            while row.slot is not None and not self.room.grow(row):
                self._pre_empt(max((other for other in self.slots if other is not None), key=lambda other: other.id))
        return bool(due) if not short else any(row is not None and row.due for row in self.slots)

    def _pre_empt(self, row: Row) -> None:
        """A row goes back to the head of the queue, and is read again when there is room for it."""
        assert row.slot is not None
        self.steps.drop(row)
        self._free(row)
        row.make_way()
        self._queue.appendleft(row)
        self.pre_emptions += 1

    def _leave_launched(self) -> None:
        """Free the slots of rows whose last token is on its way."""
        for row in self.slots:
            if row is not None and not row.to_launch:
                self._free(row)

    def _end(self, row: Row) -> None:
        """A row has ended: nothing of it stays."""
        del self._rows[row.id]
        if row.slot is not None and self.slots[row.slot] is row:
            self._free(row)
        if not self._rows:
            self.steps.finish()

    def _free(self, row: Row) -> None:
        """A row leaves its slot."""
        assert row.slot is not None
        if row is self._reading:
            self._reading = None
        self.room.leave(row)
        self.slots[row.slot] = None
        self.steps.leave(row.slot)

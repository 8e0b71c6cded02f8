"""The one loop that decodes. Requests join and leave at the border of two steps; each is answered as it would be alone.

    engine = Engine(runner, rows=8, length=512)
    ids = [engine.add(request) for request in requests]
    while engine.busy:
        for event in engine.step():
            ...

An engine has a fixed number of slots, each a row of one cache, so that compiled code and recorded graphs see one shape. A request
waits until a slot is free, first come first served; requests that find all slots free are read together.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

from llama_fast.contracts import KVCache
from llama_fast.engine.request import Event, Request, Row, Writer, check_bias, check_request
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
    ):
        """`length`: positions that a request may have, prompt and answer. `cache`: one for `rows` rows, else it is allocated.

        `draft` proposes tokens that are checked several at a time; requests that come while others are answered then wait until
        these have ended. `keeps_prefixes`: of a prompt that begins as what its slot held before, only the rest is read.
        """
        self.runner = made("runner", runner, "a Runner, as build() makes one", "start", "step", "allocate")
        self.length, self.draft, self.keeps_prefixes = whole("length", length, 1), draft, keeps_prefixes
        rows = whole("rows", rows, 1)
        if draft is not None:
            made("draft", draft, "who proposes tokens, as Draft(runner) or Ngram()", "begin", "slack")
        if cache is None:
            room = length if draft is None else max(length, min(length + draft.slack, runner.config.max_context))
            cache = runner.allocate(rows, room)
        self.cache = check_cache(cache, rows, length)
        self.slots: list[Row | None] = [None] * rows
        self.steps: Stepper = PlainSteps(runner, self.slots, cache, length, keeps_prefixes)
        self.statistics: Statistics | None = None
        """What speculation did for the requests that started last."""
        self.reused_tokens = 0
        """Tokens of all prompts so far that were not read, because their slots held them."""
        self._rows: dict[int, Row] = {}
        self._queue: deque[Row] = deque()
        self._numbers = itertools.count()
        self._before: list[Row | None] = [None] * rows
        """The row whose keys and values stand in each slot."""

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
        row = Row(next(self._numbers), request, writer)
        self._rows[row.id] = row
        self._queue.append(row)
        return row.id

    def step(self) -> list[Event]:
        """Let requests join, launch what is due, and wait for the oldest step under way: what came of it."""
        self._admit()
        while self.steps.is_due():
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
        row = self._before[slot]
        return [] if row is None else [*row.request.ids, *row.tokens[:-1]]  # the last was chosen, and not yet read

    def _admit(self) -> None:
        """Read the prompts of requests for which there are slots."""
        slots = [slot for slot, row in enumerate(self.slots) if row is None]
        alone = len(slots) == len(self.slots)
        if self.draft is not None and not alone:
            return
        joining = [(slot, self._queue.popleft()) for slot in slots[: len(self._queue)]]
        if self.draft is not None and joining:
            requests = [row.request for _, row in joining]
            cache = self.cache if len(joining) == len(self.slots) else self.cache.rows(0, len(joining))
            self.steps = self.draft.begin(self.runner, requests, cache)
            self.statistics = self.steps.statistics
        for slot, row in joining:
            row.slot, row.held = slot, self._in_common(slot, row)
            self.reused_tokens += row.held
        together = alone and not any(row.held for _, row in joining)
        for group in [joining] if joining and together else [[one] for one in joining]:
            first, rows = group[0][0], [row for _, row in group]
            places = slice(first, first + len(rows))
            self._before[places] = [None] * len(rows)  # also if reading is interrupted
            self.slots[places] = rows
            self.steps.start(first, rows)
            if self.keeps_prefixes:
                self._before[places] = rows
        self._leave_launched()

    def _in_common(self, slot: int, row: Row) -> int:
        """How many tokens of a row's prompt, but for the last, its slot holds already."""
        return min(common(row.request.ids, self.kept(slot)), len(row.request.ids) - 1)

    def _leave_launched(self) -> None:
        """Free the slots of rows whose last token is on its way."""
        for slot, row in enumerate(self.slots):
            if row is not None and not row.to_launch:
                self._free(slot)

    def _end(self, row: Row) -> None:
        """A row has ended: nothing of it stays."""
        del self._rows[row.id]
        if row.slot is not None and self.slots[row.slot] is row:
            self._free(row.slot)
        if not self._rows:
            self.steps.finish()

    def _free(self, slot: int) -> None:
        self.slots[slot] = None
        self.steps.leave(slot)


def check_cache(cache: KVCache, rows: int, positions: int) -> KVCache:
    """The cache; TypeError for what is none, ValueError for one that is made for other requests."""
    made("cache", cache, "a cache, as runner.allocate() makes one", "layers", "length", "reserve")
    if cache.batch != rows:
        raise ValueError(f"cache: it is made for {cache.batch} rows, and there are {rows} prompts")
    if cache.capacity is not None and cache.capacity < positions:
        raise ValueError(f"cache: it has {cache.capacity} slots, and the request needs {positions}")
    return cache


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How long two sequences are the same: ([1, 2, 3], [1, 2, 4, 5]) -> 2."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))

"""Where a row's keys and values stand: in slots of its own, or in pages that rows share. One of the two for every engine.

A room says whether a row may join, what of its tokens is there already, and whether it may go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard

from llama_fast.contracts import KVCache
from llama_fast.engine.caches import part_of
from llama_fast.engine.pages import Pages
from llama_fast.engine.request import Request, Row
from llama_fast.engine.runner import Runner


class PagedKVCache(KVCache, Protocol):
    """A cache whose rows have pages of a common pool, where an engine says which: a `KVCache` with these members besides."""

    @property
    def page(self) -> int:
        """Positions of a page."""

    @property
    def pages(self) -> int:
        """Pages that rows can have, numbered from 1 on. Page 0 is written by whoever has none, and read by nobody."""

    @property
    def row_pages(self) -> int:
        """Pages of the longest row."""

    def assign(self, row: int, pages: Sequence[int], first: int = 0) -> None:
        """These are a row's pages from its `first` on, and behind them it has none. Takes its turn on the device."""

    def see(self, pages: int | None) -> None:
        """Let attention read the first so many pages of every row, None: all."""

    def rows(self, first: int, count: int) -> PagedKVCache: ...


class Room(Protocol):
    """The keys and values of an engine's rows."""

    @property
    def keeps_slots(self) -> bool:
        """Whether what a row wrote stays in its slot behind it."""

    def kept(self, slot: int) -> list[int]:
        """The ids whose keys and values stay in a slot."""

    def check(self, request: Request) -> None:
        """ValueError, with the numbers, for a request that could never be answered here."""

    def take(self, slot: int, row: Row, beside: Sequence[Row]) -> bool:
        """Give a row its place in a slot, and say in `row.held` how many of its tokens are there; False if there is none now.

        `beside`: rows that will be read in the same pass. A row that had better be read behind them is not taken.
        """

    def learn(self, row: Row) -> None:
        """What a row has read so far stands in its place."""

    def look(self, first: int, count: int) -> None:
        """The next pass goes through these slots."""

    def short(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Those of these rows that have no place for their next token."""

    def grow(self, row: Row) -> bool:
        """Make room for the next token of a row; False if there is none."""

    def leave(self, row: Row) -> None:
        """A row gives up its place."""


class OwnSlots:
    """Every slot has as many positions as a request may have."""

    def __init__(self, rows: int, keeps_prefixes: bool):
        """`keeps_prefixes`: a row starts behind what its slot held before, as far as it begins alike."""
        self.before: list[Row | None] = [None] * rows
        """The row whose keys and values stand in each slot, where they are looked at again."""
        self.keeps_slots = keeps_prefixes

    def check(self, request: Request) -> None:
        """Nothing that the engine does not know."""

    def take(self, slot: int, row: Row, beside: Sequence[Row]) -> bool:
        held = min(common(row.ids, self.kept(slot)), len(row.ids) - 1)
        if held and beside:
            return False
        row.held, self.before[slot] = held, None  # also if reading is interrupted
        return True

    def kept(self, slot: int) -> list[int]:
        row = self.before[slot]
        return [] if row is None else row.stored

    def learn(self, row: Row) -> None:
        if self.keeps_slots and not row.reading:
            assert row.slot is not None
            self.before[row.slot] = row

    def look(self, first: int, count: int) -> None:
        """All slots have one length."""

    def short(self, rows: Sequence[Row]) -> Sequence[Row]:
        return ()

    def grow(self, row: Row) -> bool:
        return True

    def leave(self, row: Row) -> None:
        """What it wrote stays until it is written over."""


class SharedPages:
    """Rows take pages as they grow, and begin behind the longest beginning that any row has left in full pages."""

    keeps_slots = False

    def __init__(self, cache: PagedKVCache, narrow: bool, ahead: int | None):
        """`narrow`: attention reads no more pages than the longest row has; else every pass has one shape.

        `ahead`: positions that a draft wants beyond a request's. Rows then have all their pages from the start, and share none.
        """
        self.pages = Pages(cache.pages, cache.page)
        self._cache, self._narrow, self._ahead = cache, narrow, ahead
        self.of_slots: list[list[int]] = [[] for _ in range(cache.batch)]
        """The pages of each slot, in the order of their positions."""
        for slot in range(cache.batch):
            cache.assign(slot, [])

    def kept(self, slot: int) -> list[int]:
        return []

    def _count(self, positions: int) -> int:
        """How many pages hold so many positions."""
        return min(-(-positions // self.pages.size), self._cache.row_pages)

    def _most(self, request: Request) -> int:
        """The pages that a request may come to need: the last token is chosen, and not read."""
        return self._count(max(request.positions - 1, len(request.ids) + 1) + (self._ahead or 0))

    def check(self, request: Request) -> None:
        if self._most(request) > self.pages.count:
            tokens = f"a prompt of {len(request.ids)} tokens and {request.max_new_tokens} new ones"
            raise ValueError(
                f"{tokens} need {self._most(request)} pages of {self.pages.size} positions; the cache has {self.pages.count} "
                f"(max_new_tokens={request.max_new_tokens})"
            )

    def take(self, slot: int, row: Row, beside: Sequence[Row]) -> bool:
        size, pages = self.pages.size, self.pages
        found = pages.find(row.ids[:-1]) if self._ahead is None else []
        if beside and (found or any(common(row.ids, other.ids) >= size for other in beside)) and self._ahead is None:
            return False
        needed = self._most(row.request) if self._ahead is not None else self._count(len(row.ids) + 1)
        running = sum(map(bool, self.of_slots))
        pages.hold(found)
        if needed - len(found) + running > pages.available:  # a page more for each row that goes on
            pages.release(found)
            return False
        self.of_slots[slot] = [*found, *pages.take(needed - len(found))]
        self._cache.assign(slot, self.of_slots[slot])
        row.held = len(found) * size
        return True

    def learn(self, row: Row) -> None:
        assert row.slot is not None
        if self._ahead is None:
            self.pages.learn(row.stored, self.of_slots[row.slot])

    def look(self, first: int, count: int) -> None:
        if self._narrow:
            part: PagedKVCache = part_of(self._cache, first, count)  # type: ignore[assignment]  # of its own kind
            part.see(max(1, *map(len, self.of_slots[first : first + count])))

    def short(self, rows: Sequence[Row]) -> Sequence[Row]:
        if self._ahead is not None:
            return ()
        size, row_pages = self.pages.size, self._cache.row_pages
        held = [self.of_slots[row.slot] for row in rows]  # type: ignore[index]  # all have slots
        return [row for row, of in zip(rows, held) if row.reach > size * len(of) < size * row_pages]

    def grow(self, row: Row) -> bool:
        assert row.slot is not None
        held = self.of_slots[row.slot]
        if not self.pages.available:
            return False
        new = self.pages.take(1)
        self._cache.assign(row.slot, new, first=len(held))
        held += new
        return True

    def leave(self, row: Row) -> None:
        assert row.slot is not None
        self.learn(row)
        self.pages.release(self.of_slots[row.slot])
        self.of_slots[row.slot] = []
        self._cache.assign(row.slot, [])


def room_of(cache: KVCache, runner: Runner, keeps_prefixes: bool, ahead: int | None) -> Room:
    """The room that an engine's cache makes."""
    if not is_paged(cache):
        return OwnSlots(cache.batch, keeps_prefixes)
    compiler = runner.plan.compiler
    one_shape = compiler.compiles_each_shape or compiler.records_addresses
    return SharedPages(cache, not one_shape and ahead is None, ahead)


def is_paged(cache: KVCache) -> TypeGuard[PagedKVCache]:
    """Whether an engine assigns the pages of a cache."""
    return hasattr(cache, "assign")


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How long two sequences are the same: ([1, 2, 3], [1, 2, 4, 5]) -> 2."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))

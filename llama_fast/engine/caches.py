"""The caches of a runner between generations: whoever generates takes one, and puts it back."""

from __future__ import annotations

from llama_fast.contracts import KVCache
from llama_fast.engine.runner import Runner
from llama_ref.arguments import made


class Caches:
    """For each number of rows the longest cache that was put back: the same addresses and shapes, so compiled code stays.

    A cache that was taken is nobody else's until it is put back: generations may be interleaved, and each then has its own.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        self.kept: dict[int, KVCache] = {}

    def take(self, rows: int, length: int) -> KVCache:
        """A cache with room for `length` positions; a new one if none is kept that is long enough."""
        kept = self.kept.pop(rows, None)
        return kept if kept is not None and room_of(kept) >= length else self.runner.allocate(rows, length)

    def put_back(self, cache: KVCache) -> None:
        """Keep a cache for the next generation, if it is of a kind that is worth it and no longer one is there."""
        if self.runner.plan.cache.fixed_addresses and room_of(cache) > (self.length(cache.batch) or 0):
            self.kept[cache.batch] = cache

    def length(self, rows: int) -> int | None:
        """Positions of a row of the cache that is kept for so many rows; None if there is none, or a generation is using it."""
        return room_of(self.kept[rows]) if rows in self.kept else None

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.kept.values())


def part_of(cache: KVCache, first: int, count: int) -> KVCache:
    """Some rows of a cache, as one whose prompts are read now; all of them: the cache itself.

    Where a single row can be had at the addresses of any other (`seat`), it is: a compiler that records addresses then records
    one pass for all slots. Such a part is good until the next one is asked for.
    """
    if count == cache.batch:
        return cache
    seat = getattr(cache, "seat", None)
    return cache.rows(first, count) if count > 1 or seat is None else seat(first)  # type: ignore[no-any-return]


def room_of(cache: KVCache) -> int:
    """Positions that a row may have, of which attention may look at fewer just now."""
    return cache.capacity or cache.length


def check_cache(cache: KVCache, rows: int, positions: int) -> KVCache:
    """The cache; TypeError for what is none, ValueError for one that is made for other requests."""
    made("cache", cache, "a cache, as runner.allocate() makes one", "layers", "length", "reserve")
    if cache.batch != rows:
        raise ValueError(f"cache: it is made for {cache.batch} rows, and there are {rows} prompts")
    if cache.capacity is not None and cache.capacity < positions:
        raise ValueError(f"cache: it has {cache.capacity} slots, and the request needs {positions}")
    return cache

"""Tiles of unknown shapes, found where they are first used: a few likely ones take turns in the step itself, and the fastest stays.

A product is timed in a pass over some blocks of the model that wants it, in a CUDA graph, beside the kernels that will run before
and after it: what is fastest alone is often not so there. Weights come from memory, as the pass reads more than a cache holds.

    choosing tiles on NVIDIA H200 for 1 row: rope 6144 x 4096 int4-g128, add 4096 x 4096 int4-g128, ...: 41 candidates
    tiles chosen in 9.3 s (7.9 s of it to compile): a pass takes 612.4 us, with general tiles 655.0; kept in ~/.cache/...
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton

from llama_fast.kernels.candidates import candidates
from llama_fast.kernels.found import SWITCH, Found, Product, is_on
from llama_fast.kernels.launching import compiled_together
from llama_fast.kernels.tuning import Tile

TritonError: Any = getattr(triton.runtime.errors, "TritonError", RuntimeError)

BUDGET_SECONDS = 18.0
"""What a process spends on choosing; products that come later keep the rule's tiles."""
COMPILING_SECONDS = 10.0
"""What it spends on compiling candidates of one pass; those that are left are the less likely ones."""
TURNS = 4
"""Candidates of each product that are compiled side by side."""
FINALISTS, ROUNDS = 3, 3
LEAST_IN_CACHES = 4
"""A model of fewer times the GPU's L2 cache is bound by latency, not by memory: its tiles matter little."""
BUCKETS = 4096

Pass = Callable[[], object]
Stopwatch = Callable[[Pass], Callable[[], float]]
"""Runs a pass once, which may raise, and makes it ready to be timed: each call then tells the microseconds of one pass."""


class Ranks(NamedTuple):
    """How processes that share a pass come to the same choice: the sum over all of them of each of some numbers."""

    sum: Callable[[Sequence[float]], list[float]] = list

    def any(self, said: bool) -> bool:
        """Whether one of them says so."""
        return self.sum([float(said)])[0] > 0

    def alike(self, number: int) -> bool:
        """Whether all say the same number."""
        votes = [0.0] * BUCKETS
        votes[number % BUCKETS] = 1.0
        votes = self.sum(votes)
        return max(votes) == sum(votes)


class FirstUse:
    """Chooses tiles for the products of passes, as they come."""

    def __init__(
        self,
        found: Found,
        stopwatch: Stopwatch,
        ranks: Ranks,
    ):
        self.found, self.stopwatch, self.ranks = found, stopwatch, ranks
        self.spent_seconds = 0.0
        self._left_to_the_rule: set[Product] = set()

    def choose(self, run: Pass) -> dict[Product, Tile]:
        """Tiles for what `run` multiplies and nobody has tiles for; they are kept. `run` may be called often, and with any tiles."""
        if not is_on():
            return {}
        with self.found.asked() as unknown, compiled_together():
            run()
        new = [product for product in unknown if product not in self._left_to_the_rule]
        several = {product: tiles for product in new if len(tiles := candidates(product)) > 1}
        alike = self.ranks.alike(zlib.crc32(repr(list(several.values())).encode()))
        if not several:
            return {}
        products = ", ".join(dict.fromkeys(f"{p.epilogue} {p.out} x {p.columns} {p.storage}" for p in several))
        rows = max(product.rows for product in several)
        what = f"on {self.found.gpu} for {f'up to {rows} rows' if rows > 1 else '1 row'}: {products}"
        self._left_to_the_rule |= several.keys()  # said once; what is chosen now is known from then on
        if not alike:
            say(f"general tiles {what}: the ranks have tiles of different shapes to choose")
            return {}
        if self.ranks.any(self.spent_seconds > BUDGET_SECONDS):
            say(f"general tiles {what}: {self.spent_seconds:.0f} s were spent on choosing; the next process goes on")
            return {}
        return self._choose(run, several, what)

    def _choose(self, run: Pass, several: Mapping[Product, Sequence[Tile]], what: str) -> dict[Product, Tile]:
        say(f"choosing tiles {what}: {sum(map(len, several.values()))} candidates ({SWITCH}=0: none)")
        began = time.perf_counter()
        several = self._compiled(run, several)
        compiled = time.perf_counter()
        before = after = self._microseconds([self.stopwatch(run)])[0]
        chosen: dict[Product, Tile] = {}
        for product, tiles in several.items():
            if self.ranks.any(self.spent_seconds + time.perf_counter() - began > BUDGET_SECONDS):
                say(f"the general tile for {product} and what comes behind it: {BUDGET_SECONDS:.0f} s are spent")
                break
            with self.found.on_trial(chosen):
                timed = self._ranked(run, product, tiles)
            if timed:
                after, chosen[product] = timed[0]
        seconds = time.perf_counter() - began
        self.spent_seconds += seconds
        self.found.keep(chosen)
        say(
            f"tiles chosen in {seconds:.1f} s ({compiled - began:.1f} s of it to compile): a pass takes {after:.1f} us, with general "
            f"tiles {before:.1f}" + (f"; kept in {self.found.file}" if self.found.file else "")
        )
        return chosen

    def _compiled(self, run: Pass, several: Mapping[Product, Sequence[Tile]]) -> dict[Product, list[Tile]]:
        """The candidates that there was time to compile, some of each product side by side.

        One that cannot be compiled is found out where it is timed.
        """
        began, most = time.perf_counter(), max(map(len, several.values()))
        for first in range(0, most, TURNS):
            with compiled_together(trials=True):
                for turn in range(first, min(first + TURNS, most)):
                    trial = {product: tiles[turn] for product, tiles in several.items() if turn < len(tiles)}
                    with (
                        self.found.on_trial(trial),
                        contextlib.suppress(ValueError),
                    ):  # a product that ranks cannot send so
                        run()
            if self.ranks.any(time.perf_counter() - began > COMPILING_SECONDS):
                return {product: list(tiles[: first + TURNS]) for product, tiles in several.items()}
        return {product: list(tiles) for product, tiles in several.items()}

    def _ranked(self, run: Pass, product: Product, tiles: Sequence[Tile]) -> list[tuple[float, Tile]]:
        """(microseconds of a pass, tile), the fastest first: the best of a first look take turns in some rounds."""
        ready: list[tuple[Tile, Callable[[], float]]] = []
        for tile in tiles:
            with self.found.on_trial({product: tile}):
                try:
                    ready.append((tile, self.stopwatch(run)))
                except (RuntimeError, ValueError, TritonError) as error:
                    told = " ".join(str(error).split())[:120]
                    say(f"no candidate: {tuple(tile)} for {product} ({type(error).__name__}: {told})")
        looks = self._microseconds([timed for _, timed in ready])
        best = sorted(range(len(ready)), key=lambda i: looks[i])[:FINALISTS]
        rounds = [self._microseconds([ready[i][1] for i in best]) for _ in range(ROUNDS)]
        medians = [statistics.median(of_tile) for of_tile in zip(*rounds)]
        return sorted(zip(medians, (ready[i][0] for i in best)))

    def _microseconds(self, timed: Sequence[Callable[[], float]]) -> list[float]:
        """Each the sum over all ranks: what a rank waits for, the others have done."""
        return self.ranks.sum([one() for one in timed])


class Replays:
    """A stopwatch on a GPU: a pass becomes a CUDA graph, which is replayed for some milliseconds."""

    def __init__(self, ranks: Ranks, milliseconds: float = 8.0):
        self.ranks, self.milliseconds = ranks, milliseconds

    def __call__(self, run: Pass) -> Callable[[], float]:
        run()  # loads its kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: a process group's watchdog has its own thread
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            held = run()
        self._microseconds(graph, 1)
        once = self.ranks.sum([self._microseconds(graph, 2)])[0]  # ranks wait for each other: all replay as often
        replays = max(3, min(50, round(self.milliseconds * 1e3 / once)))
        return lambda: self._microseconds(graph, replays, held)

    def _microseconds(self, graph: torch.cuda.CUDAGraph, replays: int, held: object = None) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        began.record()
        for _ in range(replays):
            graph.replay()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) * 1e3 / replays


def say(text: str) -> None:
    """One line on stderr, of the first rank's alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)

"""Is a server's memory the same after so many short requests? In the process that serves; the clients are another one.

    python -m tests.instruments.serving_soak --requests 20000 [--trace]

A tiny model answers requests of all kinds: streamed and whole, several choices, stop strings, log-probabilities, conversations,
refusals, and clients that leave. A line for every 1,000 tells resident memory, what of it the C library has given out (the rest
may be its free lists), how many objects the collector knows, and the open files. `--trace` tells which lines of code hold more
Python memory at the end than after 3,000.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tracemalloc

import psutil

from llama_fast import Llama
from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.plan import Plan
from llama_fast.serve.memory import bound_prepared_products
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.tokenizer import RandomTokenizer
from tests.instruments.serving_load import ROOT, Loaded

EVERY = 1000
WARM = 3


def tiny() -> Llama:
    config = LlamaConfig(48, 2, 6, 2, 10, 72, 259, 512)
    return Llama(build(random_checkpoint(config, 3), Plan(cache=Static()), "cpu"), RandomTokenizer(259, None, ()))


class Mallinfo(ctypes.Structure):
    """What glibc's mallinfo2 returns: numbers of bytes, of which two are read here."""

    _fields_ = [(f"field_{i}", ctypes.c_size_t) for i in range(10)]


def given_out() -> float:
    """Megabytes that programs hold from glibc's allocator, in all threads: pieces of its arenas, and mappings of their own."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    found = mallinfo()
    return float(found.field_7 + found.field_4) / 1e6


def soak(requests: int, trace: bool) -> list[float]:
    """Resident megabytes after each thousand requests."""
    bound_prepared_products()
    process, resident, before = psutil.Process(), [], None
    if trace:
        tracemalloc.start(12)
    with Loaded(tiny(), rows=4, length=256) as loaded:
        for number in range(requests // EVERY):
            command = [sys.executable, "-m", "tests.instruments.short_requests", loaded.url, str(EVERY), str(number)]
            subprocess.run(command, check=True, cwd=ROOT)
            gc.collect()
            resident.append(process.memory_info().rss / 1e6)
            counts = f"{given_out():.1f} given out, {len(gc.get_objects())} objects, {len(os.listdir('/proc/self/fd'))} files"
            held = f", Python's own {tracemalloc.get_traced_memory()[0] / 1e6:.2f} MB" if trace else ""
            print(f"{(number + 1) * EVERY:6} requests: {resident[-1]:.1f} MB, {counts}{held}", flush=True)
            if trace and number + 1 == WARM:
                before = tracemalloc.take_snapshot()
        engine = loaded.served.thread.engine
        assert not engine.busy and engine.free == len(engine.slots), "rows are left"
        if before is not None:
            for line in tracemalloc.take_snapshot().compare_to(before, "lineno")[:12]:
                print(line)
    return resident


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--trace", action="store_true")
    given = parser.parse_args()
    found = soak(given.requests, given.trace)
    late = found[len(found) // 2 :]
    print(f"second half: {min(late):.1f}-{max(late):.1f} MB")

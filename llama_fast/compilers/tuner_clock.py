"""A clock for inductor's tuner that sees kernels and not the host.

`coordinate_descent_tuning` compares tiles by the time between two events around a launch. Where the host launches more slowly
than the GPU computes, the GPU waits between the events, and what is compared is the host: products then come out up
to 1.6 times slower than their best tile, others in every process. Here a kernel's launches queue up behind a stall.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

REPEATS = 9
CYCLES_PER_MS = 2_000_000  # of a GPU at 2 GHz; a slower one stalls longer
LONGEST_STALL_MS = 256


class TunerClock:
    """Milliseconds of a kernel whose inputs are in no cache: the median of some runs, each behind a `flush`."""

    def __init__(self, flush: Callable[[], object]):
        self._flush = flush
        self._stall_ms = 1

    def __call__(self, launch: Callable[[], object], *inductors: Any, **options: Any) -> float:
        launch()  # loads it
        times = self._times(launch)
        while times is None:
            self._stall_ms *= 2
            times = self._times(launch)
        return statistics.median(times)

    def _times(self, launch: Callable[[], object]) -> list[float] | None:
        """Of each run; None if the GPU was through with the stall before the host had queued the last."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
        stalled = torch.cuda.Event()
        torch.cuda.synchronize()
        torch.cuda._sleep(self._stall_ms * CYCLES_PER_MS)
        stalled.record()
        for began, ended in pairs:
            self._flush()
            began.record()
            launch()
            ended.record()
        in_time = not stalled.query() or self._stall_ms >= LONGEST_STALL_MS
        torch.cuda.synchronize()
        return [began.elapsed_time(ended) for began, ended in pairs] if in_time else None


@contextmanager
def steady_tuning(device: torch.device) -> Iterator[None]:
    """While this lasts, inductor's tuner has this clock on a GPU. Takes memory: twice the GPU's L2 cache."""
    if device.type != "cuda":
        yield
        return
    from torch._inductor.runtime.benchmarking import benchmarker  # not above: importing it starts CUDA

    more_than_cached = torch.ones(2 * torch.cuda.get_device_properties(device).L2_cache_size // 4, device=device)
    benchmarker.benchmark_gpu = TunerClock(more_than_cached.sum)  # type: ignore[method-assign]
    try:
        yield
    finally:
        vars(benchmarker).pop("benchmark_gpu", None)  # the class's own stands again

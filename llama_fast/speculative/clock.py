"""The time that rounds take on their device, by which a number of proposals is chosen."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from llama_fast.engine.runner import Runner

Mark = float | torch.cuda.Event
Marks = tuple[Mark, Mark, Mark]
"""Before the proposals, before the check, and after all."""


class Clock:
    """Marks in the device's own time: they cost no wait, and are read after the round is."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Mark, end: Mark) -> float:
        if isinstance(begin, float) or isinstance(end, float):
            assert isinstance(begin, float) and isinstance(end, float)
            return end - begin
        return begin.elapsed_time(end) / 1e3  # type: ignore[no-any-return]


def agreement(runner: Runner) -> Callable[[float], float]:
    """How the processes of a group come to one number: its sum. Alone, the number itself."""
    everyone = runner.plan.shard.everyone
    if everyone.alone:
        return lambda seconds: seconds
    return lambda seconds: float(everyone(torch.full((8,), seconds, dtype=torch.float32, device=runner.device))[0])

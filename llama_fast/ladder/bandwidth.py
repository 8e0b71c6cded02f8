"""The read bandwidth of a device, measured: the wall that every rung is held against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from llama_fast.model.roofline import GB

ROWS = 2**12


class Wall:
    """The most that a device was seen to read. A CPU's memory is often shared with others: what it gives changes within
    seconds, so it is looked at again between samples."""

    def __init__(self, device: torch.device):
        self._device = device
        self.gb_per_s = read_bandwidth_gb_per_s(device)

    def look_again(self) -> None:
        if self._device.type == "cpu":
            self.gb_per_s = max(self.gb_per_s, read_bandwidth_gb_per_s(self._device))


def read_bandwidth_gb_per_s(device: torch.device, seconds: float = 0.3) -> float:
    """The best of the reads that `seconds` have room for, in GB/s, of a tensor far larger than any cache.

    Which reduction keeps up with the memory differs from machine to machine (on one CPU the norm is bound by arithmetic
    at half of what the sum reads), so several are tried.
    """
    gpu = device.type == "cuda"
    data = torch.ones(2**30 if gpu else 2**27, dtype=torch.float32, device=device)
    readers: tuple[Callable[[], Tensor], ...] = (
        lambda: data.sum(),
        lambda: data.view(ROWS, -1).sum(1),
        lambda: torch.linalg.vector_norm(data),
    )
    took = _gpu_seconds if gpu else _cpu_seconds
    end, best = time.perf_counter() + seconds, min(map(took, readers))
    while time.perf_counter() < end:
        best = min(best, *map(took, readers))
    return data.nbytes / best / GB


def _cpu_seconds(work: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _gpu_seconds(work: Callable[[], Tensor]) -> float:
    """By the GPU's own clock: a launch and a wait are 1% of one read."""
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's queued work; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

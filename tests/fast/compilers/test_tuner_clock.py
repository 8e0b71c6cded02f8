"""The tuner's clock, on a made-up GPU whose host is slow: what it says is the kernel's time and not the launch's."""

from __future__ import annotations

import pytest
import torch

from llama_fast.compilers.tuner_clock import LONGEST_STALL_MS, TunerClock

MS = 1e-3


class SlowHost:
    """A GPU with a queue, and a host that needs `launch_ms` for every launch. Times in ms."""

    def __init__(self, launch_ms: float, monkeypatch: pytest.MonkeyPatch):
        self.launch_ms, self.now, self.free_at = launch_ms, 0.0, 0.0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: MadeUpEvent(self))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / 2e6))

    def launch(self, kernel_ms: float) -> None:
        self.now += self.launch_ms
        self.free_at = max(self.free_at, self.now) + kernel_ms

    def synchronize(self) -> None:
        self.now = max(self.now, self.free_at)


class MadeUpEvent:
    def __init__(self, gpu: SlowHost):
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = max(self.gpu.free_at, self.gpu.now)

    def query(self) -> bool:
        return self.gpu.now >= self.at

    def elapsed_time(self, ended: MadeUpEvent) -> float:
        return ended.at - self.at


@pytest.mark.parametrize("launch_us", [5, 100, 2000])
@pytest.mark.parametrize("kernel_us", [3, 13, 90])
def test_it_says_the_kernels_time_on_any_host(launch_us: int, kernel_us: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SlowHost(launch_us * MS, monkeypatch)
    clock = TunerClock(lambda: gpu.launch(33 * MS))
    assert clock(lambda: gpu.launch(kernel_us * MS), warmup=25, rep=40) == pytest.approx(kernel_us * MS)


def test_a_host_that_never_keeps_up_is_an_end_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that others use: an answer, though a poor one, and no endless loop."""
    gpu = SlowHost(LONGEST_STALL_MS, monkeypatch)
    clock = TunerClock(lambda: gpu.launch(0.033))
    assert clock(lambda: gpu.launch(0.013)) > 1


def test_a_run_disturbed_by_others_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, runs = SlowHost(0.005, monkeypatch), iter(range(1000))
    clock = TunerClock(lambda: gpu.launch(0.033))
    assert clock(lambda: gpu.launch(5.0 if next(runs) % 4 == 1 else 0.013)) == pytest.approx(0.013)

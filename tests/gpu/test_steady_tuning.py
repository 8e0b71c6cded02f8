"""Inductor's tuner gets a clock of ours, and that clock sees the kernel behind a host as slow as can be."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from llama_fast.build import build
from llama_fast.compilers.tuner_clock import TunerClock, steady_tuning
from llama_fast.engine.generate import generate
from llama_fast.ladder.bandwidth import Wall
from llama_fast.recipes import optimised
from llama_ref.checkpoint import random_checkpoint
from tests.gpu.test_cuda_graphs import CONFIG

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
CUDA = torch.device("cuda")


def test_a_slow_host_changes_nothing() -> None:
    data, flush = torch.ones(2**24, device=CUDA), torch.ones(2**26, device=CUDA)
    clock = TunerClock(flush.sum)

    def slowly() -> None:
        time.sleep(5e-4)
        data.sum()

    quick, slow = clock(data.sum), clock(slowly)
    print(f"64 MiB read in {quick * 1e3:.1f} us; by a host that needs 500 us for a launch: {slow * 1e3:.1f} us")
    assert slow == pytest.approx(quick, rel=0.1)
    assert 1e-6 * data.nbytes / quick < 1.05 * Wall(CUDA).gb_per_s, "no read from the cache"


def test_the_tuner_asks_it_and_is_given_back_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.benchmarking import benchmarker
    from torch._inductor.utils import fresh_cache

    answers = []
    own = TunerClock.__call__

    def watched(self: TunerClock, *arguments: Any, **options: Any) -> float:
        answers.append(own(self, *arguments, **options))
        return answers[-1]

    monkeypatch.setattr(TunerClock, "__call__", watched)
    torch._dynamo.reset()
    with fresh_cache():  # a tuner that remembers asks nobody
        runner = build(random_checkpoint(CONFIG, 0, CUDA, torch.bfloat16), optimised(compile=True), "cuda")
        generate(runner, [[3, 1, 4]], 4)
    print(f"{len(answers)} answers, {min(answers) * 1e3:.1f} to {max(answers) * 1e3:.1f} us")
    assert len(answers) > 20 and 0 < min(answers) <= max(answers) < 1
    assert "benchmark_gpu" not in vars(benchmarker)
    with pytest.raises(RuntimeError, match="out of memory"), steady_tuning(CUDA):
        torch.empty(2**50, device=CUDA)
    assert "benchmark_gpu" not in vars(benchmarker)

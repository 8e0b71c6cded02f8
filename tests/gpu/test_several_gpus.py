"""The ladder's rungs over ranks, on up to four GPUs of this host, held against `targets.toml`."""

from __future__ import annotations

import pytest
import torch

from llama_fast.ladder import jobs
from llama_fast.ladder.rungs import RUNGS
from tests.gpu.targets import MODEL, target

RANKS = min(4, torch.cuda.device_count())
REQUEST = ["--model", MODEL, "--prompt", "Hello, my name is", "--device", "cuda"]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(RANKS < 2, reason="needs several GPUs")]


@pytest.mark.parametrize("name", [name for name, rung in RUNGS.items() if rung.over_ranks])
def test_a_rung_over_ranks_reaches_its_target(name: str) -> None:
    torch.cuda.empty_cache()  # the first rank works on this process's GPU
    (rung,) = jobs.climb([RUNGS[name]], RANKS, REQUEST, print)
    gpu = torch.cuda.get_device_name()
    goal, source = target(rung, gpu)
    reached = rung.tokens_per_second.median
    print(
        f"{name} on {RANKS} x {gpu}: measured {reached:.1f} tokens/s, target {goal:.1f} ({source}), "
        f"floor {rung.floor_tokens_per_second:.1f}"
    )
    assert (rung.ranks, rung.verdict) == (RANKS, "AGREE")
    assert reached >= goal

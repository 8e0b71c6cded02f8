"""On a GPU the compiled decode step really is one CUDA graph, replayed for every token, and nothing recompiles."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from llama_fast.build import build
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.generate import generate
from llama_fast.engine.sampling import Sampling
from llama_fast.recipes import optimised
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

CONFIG = LlamaConfig(
    dim=256, n_layers=3, n_heads=8, n_kv_heads=2, head_dim=32, ffn_dim=512, vocab_size=1000, max_context=512
)


@pytest.mark.parametrize(
    ("encoding", "sampling"),
    [(Dense(), Sampling()), (Int8(), Sampling(0.8, top_k=200, seed=3))],
    ids=["dense-greedy", "int8-sampled"],
)
def test_graphs_replay_and_nothing_recompiles(encoding: object, sampling: Sampling) -> None:
    torch._dynamo.reset()
    counters.clear()
    checkpoint = random_checkpoint(CONFIG, 0, torch.device("cuda"), torch.bfloat16)
    runner = build(checkpoint, optimised(encoding, compile=True), "cuda")  # type: ignore[arg-type]
    cache = runner.allocate(1, 250)
    warm = [generate(runner, [[5] * 9], 20, sampling, cache=cache) for _ in range(3)]
    compiled = counters["stats"]["unique_graphs"]
    for length in (1, 2, 50):
        generate(runner, [[7] * length], 20, sampling, cache=cache)
    assert counters["stats"]["unique_graphs"] == compiled == 2
    assert counters["inductor"]["cudagraph_skips"] == 0
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        again = generate(runner, [[5] * 9], 20, sampling, cache=cache)
        torch.cuda.synchronize()
    launches = sum(event.count for event in trace.key_averages() if "cudaGraphLaunch" in event.key)
    assert launches == 19, "one graph launch for each decoded token"
    assert again.completions == warm[0].completions == warm[2].completions

"""What the fused plan must reach beyond the ladder: long contexts, a small model, prefill, start-up, memory.

Bars are in `targets.toml` under the GPU's name; a GPU without them is measured and printed, and asserts the generic ones.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llama_fast.build import build
from llama_fast.encodings.dense import Dense
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner
from llama_fast.ladder.bandwidth import read_bandwidth_gb_per_s
from llama_fast.model.roofline import GB, cache_bytes_per_step, floor_steps_per_second, weight_bytes_per_step
from llama_fast.recipes import fused
from llama_ref.models import open_model
from tests.gpu import targets

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
CUDA = torch.device("cuda")


def bar(name: str) -> float:
    """The wall's bar of that name for this GPU."""
    return targets.bar(name, torch.cuda.get_device_name())


@pytest.fixture(scope="module")
def seven() -> Runner:
    return build(open_model("random:llama-2-7b", CUDA, torch.bfloat16), fused(Dense()), CUDA)


def decode_rate(runner: Runner, prompt: list[int], new_tokens: int = 200) -> float:
    cache = runner.allocate(1, len(prompt) + new_tokens)
    generate(runner, [prompt], 8, cache=cache)
    return statistics.median(
        generate(runner, [prompt], new_tokens, cache=cache).decode_tokens_per_second for _ in range(5)
    )


def test_long_context(seven: Runner) -> None:
    bandwidth = read_bandwidth_gb_per_s(CUDA)
    rate = decode_rate(seven, [i % 1000 for i in range(3896)])
    read = weight_bytes_per_step(seven.model) + cache_bytes_per_step(seven.config, 1, 3996, 2)
    floor = floor_steps_per_second(read, bandwidth)
    print(f"7B bf16 at 3896 to 4096 tokens of context: {rate:.1f} tokens/s, floor {floor:.1f}, {rate / floor:.1%}")
    assert rate >= bar("share_at_4096") * floor


def test_prefill_of_2048_tokens(seven: Runner) -> None:
    a, b = (torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16) for _ in range(2))

    def seconds(work: object) -> float:
        assert callable(work)
        times = []
        for _ in range(6):
            torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    matmul_flops = 2 * 8192**3 / seconds(lambda: a @ b)
    T, c = 2048, seven.config
    weights = c.n_layers * c.dim * (2 * (c.n_heads + c.n_kv_heads) * c.head_dim + 3 * c.ffn_dim)
    flops = 2 * T * weights + 2 * T * T * c.n_layers * c.n_heads * c.head_dim  # causal: half of 4 T^2 d a head
    cache = seven.allocate(1, T + 8)
    tokens, length = torch.randint(1000, (1, T), device=CUDA), torch.tensor([T], device=CUDA)
    took = seconds(lambda: seven.prefill(tokens, length, cache))
    share = flops / took / matmul_flops
    print(f"prefill of {T}: {took * 1e3:.1f} ms, {share:.1%} of {matmul_flops / 1e12:.0f} TFLOP/s measured")
    assert share >= bar("prefill_share")


def test_memory(seven: Runner) -> None:
    """Beyond the weights and the cache, for a context of 512."""
    gc.collect()
    torch.cuda.empty_cache()
    cache = seven.allocate(1, 512)
    torch.cuda.reset_peak_memory_stats()
    generate(seven, [[5] * 6], 200, cache=cache)
    held = weight_bytes_per_step(seven.model) + 2 * seven.config.vocab_size * seven.config.dim
    extra = (torch.cuda.max_memory_allocated() - held - cache_bytes_per_step(seven.config, 1, 512, 2)) / GB
    print(f"peak beyond weights and cache: {extra:.2f} GB")
    assert extra <= bar("extra_memory_gb")


def test_a_small_model() -> None:
    runner = build(open_model("random:llama-3.2-1b", CUDA, torch.bfloat16), fused(Dense()), CUDA)
    rate = decode_rate(runner, [1, 2, 3, 4, 5, 6])
    read = weight_bytes_per_step(runner.model) + cache_bytes_per_step(runner.config, 1, 106, 2)
    floor = floor_steps_per_second(read, read_bandwidth_gb_per_s(CUDA))
    print(f"1B bf16: {rate:.1f} tokens/s, floor {floor:.1f}, {rate / floor:.1%}")
    assert rate >= bar("small_model_share") * floor


def test_first_token_of_a_cold_and_of_a_warm_process(tmp_path: Path) -> None:
    """Wall time of a whole process that prints one token, its import and its 7B random weights included."""
    caches = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    command = [sys.executable, "-m", "llama_fast.ladder.cli", "generate", "--model", "random:llama-2-7b", "--fused"]
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        subprocess.run([*command, "--max-new-tokens", "2"], env={**os.environ, **caches}, check=True, timeout=300)
        seconds.append(time.perf_counter() - began)
    print(f"one token of a cold process {seconds[0]:.1f} s, of a warm one {seconds[1]:.1f} s")
    assert seconds[0] <= bar("cold_seconds") and seconds[1] <= bar("warm_seconds")

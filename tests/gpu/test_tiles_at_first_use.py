"""Tiles of a shape that no table knows, on a GPU: found in time, kept, right, and no slower than the rule's."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llama_fast.build import build
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner
from llama_fast.kernels.first_use import FirstUse, Ranks, Replays
from llama_fast.kernels.found import SWITCH, found_tiles
from llama_fast.recipes import encoding_named, fused, optimised
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(580)]
ENOUGH = 20.0
"""Seconds that choosing may take in all."""
CONFIG = LlamaConfig(
    dim=4096, n_layers=4, n_heads=32, n_kv_heads=8, head_dim=128, ffn_dim=14592, vocab_size=50_000, max_context=512
)
"""An 8B's with few blocks, and a width and a vocabulary that nobody has: no table will know them."""
PROMPT = """
import sys, time
import torch
from llama_fast.build import build
from llama_fast.engine.generate import generate
from llama_fast.recipes import encoding_named, fused
from llama_ref.checkpoint import random_checkpoint
from tests.gpu.test_tiles_at_first_use import CONFIG
runner = build(random_checkpoint(CONFIG, 1, "cuda", torch.bfloat16), fused(encoding_named(sys.argv[1])), "cuda")
began = time.perf_counter()
generate(runner, [[5, 6, 7]], 16)
print(time.perf_counter() - began)
"""


def first_generation(encoding: str, cache: Path, switch: str = "1") -> tuple[float, str]:
    """Seconds of the first generation of a process, and what it said on stderr."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "LLAMA_FAST_CACHE": str(cache), SWITCH: switch, "PYTHONPATH": str(root)}
    environment |= {"TRITON_CACHE_DIR": str(cache / "triton")}
    done = subprocess.run(
        [sys.executable, "-c", PROMPT, encoding], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout), done.stderr


@pytest.mark.parametrize("encoding", ["dense", "int8", "int4"])
def test_choosing_takes_seconds_once_and_is_kept(encoding: str, tmp_path: Path) -> None:
    plain, _ = first_generation(encoding, tmp_path, "0")
    cold, said = first_generation(encoding, tmp_path)
    warm, again = first_generation(encoding, tmp_path)
    print(f"{encoding}: a first generation takes {plain:.1f} s without, {cold:.1f} s with, {warm:.1f} s the next time")
    print(said)
    assert "choosing tiles on" in said and "tiles chosen in" in said
    assert cold - plain < ENOUGH
    assert "choosing" not in again and warm < cold - 1


@pytest.mark.parametrize("encoding", ["dense", "int8", "int4", "fp8"])
def test_with_chosen_tiles_a_step_is_right_and_no_slower(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_fast.kernels.found.kept_in", lambda gpu: None)
    found_tiles.cache_clear()
    kind = encoding_named(encoding)
    checkpoint = random_checkpoint(CONFIG, 1, "cuda", torch.bfloat16)
    exact = build(checkpoint, optimised(kind), "cuda", torch.float32)
    ids, lengths = torch.randint(0, 50_000, (1, 20), device="cuda"), torch.tensor([20], device="cuda")
    want = exact.prefill(ids, lengths, exact.allocate(1, 32)).double()
    del exact
    rates: dict[str, float] = {}
    for switch in ("0", "1"):
        monkeypatch.setenv(SWITCH, switch)
        runner = build(checkpoint, fused(kind), "cuda")
        cache = runner.allocate(1, 256)
        logits = runner.prefill(ids[:, :19], lengths - 1, cache)
        logits = runner.decode(ids[:, 19:], lengths - 1, cache)[:, -1].double()
        assert ((logits - want).norm() / want.norm()).item() < 2e-2, switch
        done = [generate(runner, [[5, 6, 7]], 200, cache=cache) for _ in range(6)]
        rates[switch] = statistics.median(one.decode_tokens_per_second for one in done[1:])
        del runner, cache
    print(f"{encoding}: {rates['0']:.1f} tokens/s with general tiles, {rates['1']:.1f} with those found")
    assert rates["1"] > 0.99 * rates["0"]


def test_what_is_known_costs_nothing() -> None:
    """A pass all of whose tiles are known is looked through in milliseconds."""
    runner: Runner = build(random_checkpoint(CONFIG, 1, "cuda", torch.bfloat16), fused(), "cuda")
    cache = runner.allocate(1, 64)
    tokens, start = torch.tensor([[5]], device="cuda"), torch.tensor([3], device="cuda")
    generate(runner, [[5, 6, 7]], 8, cache=cache)  # chosen and compiled, if they were not
    found, ranks = found_tiles(torch.cuda.get_device_name()), Ranks()
    began = time.perf_counter()
    with torch.no_grad():
        assert FirstUse(found, Replays(ranks), ranks).choose(lambda: runner.model(tokens, start, cache)) == {}
    assert time.perf_counter() - began < 0.5

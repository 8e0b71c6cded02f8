"""The fused plan on a GPU: every row count, every position of a small cache, odd sizes, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama_fast.build import build
from llama_fast.contracts import Encoding
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import Sampling
from llama_fast.recipes import fused
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.model import Llama as Reference
from oracle.verify import judge_runner

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

GROUPED = LlamaConfig(
    dim=256, n_layers=3, n_heads=8, n_kv_heads=2, head_dim=64, ffn_dim=512, vocab_size=1000, max_context=512
)
CONFIGS = {
    "grouped": GROUPED,
    "odd": LlamaConfig(
        dim=200, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=80, ffn_dim=328, vocab_size=1003, max_context=512
    ),
    "tied": dataclasses.replace(GROUPED, tie_embeddings=True, n_kv_heads=8),
}


@pytest.fixture(params=[*CONFIGS], ids=str)
def config(request: pytest.FixtureRequest) -> LlamaConfig:
    return CONFIGS[request.param]


@pytest.fixture(params=[Dense(), Int8()], ids=lambda e: e.name)
def runner(request: pytest.FixtureRequest, config: LlamaConfig) -> Runner:
    encoding: Encoding = request.param
    return build(random_checkpoint(config, 1, torch.device("cuda"), torch.bfloat16), fused(encoding), "cuda")


def relative_error(logits: torch.Tensor, truth: torch.Tensor) -> float:
    return float((logits.double() - truth).norm() / truth.norm())


def test_every_row_count_at_every_position(runner: Runner, config: LlamaConfig) -> None:
    """B x T of 1..8 rows at starts that differ by row; error at most 1.5 times that of the bf16 reference."""
    truth, yardstick = (
        Reference(config, runner.reference_weights(), dtype) for dtype in (torch.float64, torch.bfloat16)
    )
    for B, T in ((1, 1), (1, 2), (1, 5), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)):
        tokens_BL = torch.randint(
            config.vocab_size, (B, 70), device="cuda", generator=torch.Generator("cuda").manual_seed(B)
        )
        exact_BLV = truth(tokens_BL)
        allowed = 1.5 * relative_error(yardstick(tokens_BL), exact_BLV)
        cache = runner.allocate(B, 70)
        seen_BLV = torch.full(exact_BLV.shape, torch.nan, device="cuda")
        offset_B = torch.arange(B, device="cuda") % 3  # rows at different positions
        rows_B1 = torch.arange(B, device="cuda")[:, None]
        for step in range(0, 70 - T - 2, T):
            start_B = torch.clamp(offset_B + step, min=0) if step else torch.zeros_like(offset_B)
            width = T if step else min(T + 2, 8 // B)  # the first step also fills what later offsets skip
            at_BT = start_B[:, None] + torch.arange(width, device="cuda")
            seen_BLV[rows_B1, at_BT] = runner.decode(tokens_BL[rows_B1, at_BT], start_B, cache).float()
            if not step and width < T + 2:
                for extra in range(width, T + 2):
                    at_B = torch.full_like(offset_B, extra)
                    seen_BLV[rows_B1, at_B[:, None]] = runner.decode(
                        tokens_BL[:, extra : extra + 1], at_B, cache
                    ).float()
        judged = ~seen_BLV.isnan().all(-1)
        assert judged.sum() > 50 * B
        assert not seen_BLV[judged].isnan().any()
        assert relative_error(seen_BLV[judged], exact_BLV[judged]) < allowed, (B, T)


def test_the_oracle_agrees(runner: Runner) -> None:
    verdict = judge_runner(runner, runner.checkpoint, cache_length=256)
    assert verdict.outcome.value == "AGREE", verdict


def test_prompts_short_and_long_ragged_and_sampled(runner: Runner, config: LlamaConfig) -> None:
    """Prompts that are recorded, padded to few widths, and long ones that run as written: either way it is the same model."""
    for prompts in ([[5, 17, 3]], [[1] * 8], [[2, 3] * 30], [[4, 5], [6, 7, 8, 9]], [[1, 2, 3], [4] * 40]):
        length = max(map(len, prompts))
        tokens_BT = torch.tensor([p + [0] * (length - len(p)) for p in prompts], device="cuda")
        lengths_B = torch.tensor([len(p) for p in prompts], device="cuda")
        exact_BTV = Reference(config, runner.reference_weights(), torch.float64)(tokens_BT)
        wanted_BV = exact_BTV[torch.arange(len(prompts), device="cuda"), lengths_B - 1]
        assert (
            relative_error(runner.prefill(tokens_BT, lengths_B, runner.allocate(len(prompts), 256)), wanted_BV) < 0.05
        )
    for sampling in (Sampling(), Sampling(0.8, top_k=200, seed=3)):
        cache = runner.allocate(2, 64)
        first, second = (generate(runner, [[5, 6, 7], [8, 9]], 20, sampling, cache=cache) for _ in range(2))
        assert first.completions == second.completions


@pytest.mark.parametrize("rows", [9, 12, 24, 64])
def test_more_rows_than_a_kernel_takes_are_recorded_and_right(runner: Runner, config: LlamaConfig, rows: int) -> None:
    """Ragged prompts, and then steps by recordings: against float64, by the error of the bf16 reference."""
    truth, yardstick = (
        Reference(config, runner.reference_weights(), dtype) for dtype in (torch.float64, torch.bfloat16)
    )
    generator = torch.Generator("cuda").manual_seed(rows)
    tokens_BL = torch.randint(config.vocab_size, (rows, 24), device="cuda", generator=generator)
    exact_BLV = truth(tokens_BL)
    allowed = 1.5 * relative_error(yardstick(tokens_BL), exact_BLV)
    lengths_B = 3 + torch.arange(rows, device="cuda") % 9
    row_B = torch.arange(rows, device="cuda")
    cache = runner.allocate(rows, 32)
    logits_BV = runner.prefill(tokens_BL[:, :12], lengths_B, cache)
    assert relative_error(logits_BV, exact_BLV[row_B, lengths_B - 1]) < allowed
    for step in range(8):
        at_B = lengths_B + step
        logits_BV = runner.decode(tokens_BL[row_B, at_B][:, None], at_B, cache)[:, 0]
        assert relative_error(logits_BV, exact_BLV[row_B, at_B]) < allowed, step


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_a_turn_behind_what_the_cache_holds_is_recorded_and_right(
    runner: Runner, config: LlamaConfig, rows: int
) -> None:
    """Three turns of unequal starts and lengths, each replayed, then one that is too long to be recorded."""
    truth, yardstick = (
        Reference(config, runner.reference_weights(), dtype) for dtype in (torch.float64, torch.bfloat16)
    )
    tokens_BL = torch.randint(config.vocab_size, (rows, 240), device="cuda", generator=torch.Generator("cuda"))
    exact_BLV = truth(tokens_BL)
    allowed = 1.5 * relative_error(yardstick(tokens_BL), exact_BLV)
    row_B = torch.arange(rows, device="cuda")
    cache, sampler = runner.allocate(rows, 256), runner.greedy(rows)
    start_B = 4 + row_B % 3
    runner.prefill(tokens_BL[:, :6], start_B, cache)
    for width in (5, 7, 6, 150):
        lengths_B = (width - row_B % 2).clamp(min=1)
        at_BT = (start_B[:, None] + torch.arange(width, device="cuda")).clamp(max=239)
        _, logits_BV = runner.extend(tokens_BL[row_B[:, None], at_BT], start_B, lengths_B, cache, sampler)
        start_B = start_B + lengths_B
        assert relative_error(logits_BV, exact_BLV[row_B, start_B - 1]) < allowed, width

"""Every plan computes the same model as the reference; impossible plans fail at construction."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llama_fast.build import build
from llama_fast.caches.growing import Growing
from llama_fast.caches.static import Static
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.runner import Runner
from llama_fast.plan import Plan
from llama_fast.recipes import fused
from llama_ref.checkpoint import Checkpoint, random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.model import Llama as Reference

SMALL = LlamaConfig(48, 2, 6, 2, 10, 72, 101, 128)

PLANS = [
    Plan(encoding, cache=cache, fuse_projections=fuse)
    for encoding in (Dense(), Int8())
    for cache in (Growing(), Static(multiple=16))
    for fuse in (False, True)
]


def reference(runner: Runner, tokens_BT: torch.Tensor) -> torch.Tensor:
    return Reference(runner.checkpoint.config, runner.reference_weights(), torch.float32)(tokens_BT)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_scores_are_the_references(checkpoint: Checkpoint, plan: Plan) -> None:
    runner = build(checkpoint, plan, "cpu")
    tokens_BT = torch.randint(101, (3, 40), generator=torch.Generator().manual_seed(1))
    logits_BTV = runner.score(tokens_BT)
    assert logits_BTV.shape == (3, 40, 101)
    torch.testing.assert_close(logits_BTV, reference(runner, tokens_BT), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_ragged_prefill_then_decode_is_the_whole_sequence(checkpoint: Checkpoint, plan: Plan) -> None:
    runner = build(checkpoint, plan, "cpu")
    tokens_BT = torch.randint(101, (3, 30), generator=torch.Generator().manual_seed(2))
    lengths_B = torch.tensor([5, 1, 12])
    expected_BTV = reference(runner, tokens_BT)
    cache = runner.allocate(3, 30)
    prompts_BT = torch.where(torch.arange(12) < lengths_B[:, None], tokens_BT[:, :12], 100)
    rows = torch.arange(3)
    torch.testing.assert_close(
        runner.prefill(prompts_BT, lengths_B, cache), expected_BTV[rows, lengths_B - 1], atol=2e-5, rtol=2e-5
    )
    for step in range(10):
        at_B = lengths_B + step
        logits_B1V = runner.decode(tokens_BT[rows, at_B][:, None], at_B, cache)
        torch.testing.assert_close(logits_B1V[:, 0], expected_BTV[rows, at_B], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_position_written_again_is_simply_replaced(untied: Checkpoint, plan: Plan) -> None:
    """What a rejected draft needs: three wrong tokens, then the right ones at the same positions, several at once."""
    runner = build(untied, plan, "cpu")
    tokens_BT = torch.randint(101, (2, 20), generator=torch.Generator().manual_seed(3))
    lengths_B = torch.tensor([8, 4])
    cache = runner.allocate(2, 20)
    runner.prefill(tokens_BT[:, :8], lengths_B, cache)
    runner.decode(torch.tensor([[1, 2, 3], [4, 5, 6]]), lengths_B, cache)
    right_BT = torch.stack([tokens_BT[0, 8:11], tokens_BT[1, 4:7]])
    logits_BTV = runner.decode(right_BT, lengths_B, cache)
    expected_BTV = reference(runner, tokens_BT)
    torch.testing.assert_close(logits_BTV[0], expected_BTV[0, 8:11], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(logits_BTV[1], expected_BTV[1, 4:7], atol=2e-5, rtol=2e-5)


def test_masked_slots_do_not_matter(untied: Checkpoint) -> None:
    runner = build(untied, Plan(cache=Static(length=32)), "cpu")
    tokens_BT = torch.tensor([[5, 6, 7], [8, 9, 10]])
    lengths_B = torch.tensor([3, 2])
    clean, dirty = runner.allocate(2, 32), runner.allocate(2, 32)
    for layer in dirty.layers:
        layer.k.fill_(1e4)
        layer.v.fill_(-1e4)
    torch.testing.assert_close(runner.prefill(tokens_BT, lengths_B, clean), runner.prefill(tokens_BT, lengths_B, dirty))
    next_B1 = torch.tensor([[1], [2]])
    torch.testing.assert_close(runner.decode(next_B1, lengths_B, clean), runner.decode(next_B1, lengths_B, dirty))


def test_int8_twice_encoded_and_read_from_disk_is_one_model(checkpoint: Checkpoint, tmp_path: object) -> None:
    from pathlib import Path

    from llama_fast.weights import named_tensors
    from llama_ref.checkpoint import open_checkpoint

    directory = Path(str(tmp_path)) / "int8"
    plan = Plan(Int8(), cache=Static(), fuse_projections=True)
    tensors = dict(named_tensors(checkpoint, plan, None, torch.device("cpu")))
    save_checkpoint(directory, checkpoint.config, tensors, "int8")
    again = open_checkpoint(directory)
    assert again.encoding == "int8"
    tokens_BT = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    assert torch.equal(build(again, plan, "cpu").score(tokens_BT), build(checkpoint, plan, "cpu").score(tokens_BT))
    with pytest.raises(ValueError, match="stored as int8, the plan asks for dense"):
        build(again, Plan(), "cpu")


def test_requests_that_do_not_fit_name_the_numbers(untied: Checkpoint) -> None:
    runner = build(untied, Plan(cache=Static(length=16)), "cpu")
    with pytest.raises(ValueError, match="17 positions do not fit a static cache of 16"):
        runner.allocate(2, 17)
    with pytest.raises(ValueError, match="129 positions exceed the model's context of 128"):
        runner.allocate(2, 129)


def test_a_checkpoints_names_are_walked_once_whichever_number_of_weights_it_has() -> None:
    class Counting(dict[str, Any]):
        walks = 0

        def __iter__(self) -> Iterator[str]:
            self.walks += 1
            return super().__iter__()

        def items(self) -> Any:
            self.walks += 1
            return super().items()

    for layers in (1, 5):
        checkpoint = random_checkpoint(dataclasses.replace(SMALL, n_layers=layers))
        weights = Counting(checkpoint.weights)
        build(dataclasses.replace(checkpoint, weights=weights), Plan(Int8()), "cpu")
        assert weights.walks == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_in_words(untied: Checkpoint) -> None:
    with pytest.raises(ValueError, match="sees no CUDA device"):
        build(untied, Plan(), "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"window": 16}, "window=16"),
    ],
)
def test_the_fused_kernels_refuse_what_they_do_not_do(change: dict[str, Any], message: str) -> None:
    checkpoint = random_checkpoint(dataclasses.replace(SMALL, **change))
    with pytest.raises(ValueError, match=f"the fused kernels do not do {message}"):
        build(checkpoint, fused(), "cpu", torch.float32)

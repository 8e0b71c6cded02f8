"""A newcomer's encoding, cache and compiler, a small file each: the seams hold, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.arithmetic.pytorch import PyTorch
from llama_fast.arithmetic.triton import Triton
from llama_fast.build import build, rebuild
from llama_fast.caches.static import Static
from llama_fast.contracts import Slots
from llama_fast.engine.generate import generate
from llama_fast.parallel.tensor_parallel import TensorParallel
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint, random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.questions.cases import standard_case
from oracle.questions.judge import Bench, judge
from oracle.questions.threads import judge_ranks
from oracle.statistics.drift import Tally, measure
from oracle.subjects.fast import FastSubject
from oracle.verify import references
from tests.leaves.counting import Counting
from tests.leaves.eight_bit_keys import EightBitKeys
from tests.leaves.two_bits import TwoBits

LONGEST_LEAF_LINES = 60
CONFIG = LlamaConfig(
    dim=72, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=16, ffn_dim=256, vocab_size=101, max_context=192, eos_ids=(7,)
)  # 128 attention columns and 256 hidden ones: two ranks part no group, and the last group of the model's width is short


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return random_checkpoint(dataclasses.replace(CONFIG, tie_embeddings=request.param), 3, "cpu", torch.float32)


def outcome(plan: Plan, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> str:
    """What the oracle says of a plan: prefill, decoding and greedy text of its cases, against the weights that it means."""
    runner = build(checkpoint, plan, "cpu", dtype)
    case = standard_case(checkpoint.config.vocab_size, checkpoint.config.max_context)
    return judge(FastSubject(runner), Bench(*references(runner, checkpoint)), case).outcome.value


def test_a_leaf_is_one_short_file() -> None:
    leaves = [path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")]
    assert len(leaves) == 3
    assert all(len(path.read_text().splitlines()) < LONGEST_LEAF_LINES for path in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("joined", [False, True], ids=["separate", "joined"])
def test_an_encoding_computes_with_what_it_decodes(checkpoint: Checkpoint, joined: bool, dtype: torch.dtype) -> None:
    assert outcome(Plan(TwoBits(), Static(), fuse_projections=joined), checkpoint, dtype) == "AGREE"


def test_the_oracle_sees_an_encoding_that_multiplies_by_something_else(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = TwoBits.product

    def off(self: TwoBits, x: torch.Tensor, parts: Any) -> torch.Tensor:
        return product(self, x, {**parts, "scale": parts["scale"].roll(1, 0)})

    monkeypatch.setattr(TwoBits, "product", off)
    assert outcome(Plan(TwoBits(), Static()), checkpoint) == "DIFFER"


def test_an_encoding_is_cut_between_its_groups_over_ranks(checkpoint: Checkpoint) -> None:
    plan = Plan(TwoBits(), Static(), fuse_projections=True)
    bench = Bench(*references(build(checkpoint, plan, "cpu"), checkpoint))
    assert judge_ranks(checkpoint, plan, torch.float32, bench, 2).outcome.value == "AGREE"


def test_two_processes_agree_with_the_oracle() -> None:
    """Over gloo; every rank judges what it heard."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
    from launched import Launched

    with Launched(2, Path(__file__)) as job:
        said, _ = job.process.communicate(timeout=300)
    assert job.process.returncode == 0, said
    assert "AGREE on 2 ranks" in said


def test_a_cut_through_a_group_is_refused_with_its_numbers() -> None:
    narrow = random_checkpoint(dataclasses.replace(CONFIG, ffn_dim=192), 3, "cpu", torch.float32)
    with pytest.raises(ValueError, match="columns 0 to 96 of 192 part a group of 64"):
        build(narrow, Plan(TwoBits(), shard=TensorParallel(0, 2)), "cpu")


def test_a_cache_of_eight_bits_is_lossy_and_the_loss_is_told(checkpoint: Checkpoint) -> None:
    assert outcome(Plan(cache=EightBitKeys()), checkpoint) == "DIFFER"
    rows = [[(7 * i * i + 3 * i + row) % 101 for i in range(90 - 30 * row)] for row in range(2)]
    exact, narrow = (FastSubject(build(checkpoint, Plan(cache=cache), "cpu")) for cache in (Static(), EightBitKeys()))
    true, ours = (subject.decode_logits(rows, [20, 11]) for subject in (exact, narrow))
    told = measure(Tally.of(ours, true, [row[split - 1 :] for row, split in zip(rows, (20, 11))]))
    assert 0 < told.kld_mean.value < 1e-3 and told.top1_agreement.value > 0.95


def test_a_cache_is_lent_and_kept_as_any_other(checkpoint: Checkpoint) -> None:
    runner = build(checkpoint, Plan(cache=EightBitKeys()), "cpu")
    cache = runner.allocate(2, 40)
    first, second = (generate(runner, [[3, 1, 4], [1, 5]], 30, cache=cache).completions for _ in range(2))
    assert first == second and cache.nbytes == sum(t.nbytes for layer in cache.layers for t in layer.tensors)


def test_a_compiler_sees_every_phase_that_runs(checkpoint: Checkpoint) -> None:
    """A prompt, every step, a text's continuation and a score: nothing goes past it."""
    counting = Counting()
    runner = build(checkpoint, Plan(cache=Static(), compiler=counting), "cpu")
    assert outcome(runner.plan, checkpoint) == "AGREE"
    counting.calls.clear()
    generate(runner, [[5, 17, 3], [9, 2]], 12)
    assert counting.calls == {"prefill": 1, "decode": 11}
    cache, sampler = runner.allocate(1, 40), runner.greedy(1)
    runner.start(torch.tensor([[5, 17]]), torch.tensor([2]), cache, sampler)
    runner.extend(torch.tensor([[3, 9, 2]]), torch.tensor([2]), torch.tensor([3]), cache, sampler)
    runner.score(torch.tensor([[5, 17, 3]]))
    assert counting.calls == {"prefill": 4, "decode": 11}


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (Plan(TwoBits(), Static(), arithmetic=Triton(), fuse_projections=True), "read no two-bits weights"),
        (Plan(cache=EightBitKeys(), arithmetic=Triton(), fuse_projections=True), "write no EightBitKeys cache"),
        (Plan(cache=Static(), arithmetic=Triton()), "need joined projections"),
    ],
    ids=["encoding", "cache", "projections"],
)
def test_what_kernels_cannot_do_is_refused_when_the_plan_is_built(
    checkpoint: Checkpoint, plan: Plan, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        build(checkpoint, plan, "cpu")


def test_a_cache_that_an_arithmetic_refuses_is_refused_for_a_model_that_is_built_already(
    checkpoint: Checkpoint,
) -> None:
    class Picky(PyTorch):
        def bind(self, config: LlamaConfig, slots: Slots, device: torch.device) -> Any:
            if not slots.cache.plain_slots:
                raise ValueError("writes plain slots alone")
            return super().bind(config, slots, device)

    runner = build(checkpoint, Plan(cache=Static(), arithmetic=Picky()), "cpu")
    with pytest.raises(ValueError, match="writes plain slots alone"):
        rebuild(runner, dataclasses.replace(runner.plan, cache=EightBitKeys()))


def on_a_rank() -> None:
    """What each of two processes does."""
    from llama_fast.parallel.ranks import tensor_parallel

    with tensor_parallel("cpu") as shard:
        checkpoint = random_checkpoint(CONFIG, 3, "cpu", torch.float32)
        for cache in (Static(), EightBitKeys()):
            encoding = TwoBits() if cache == Static() else Plan().encoding
            plan = Plan(encoding, cache, Counting(), shard, fuse_projections=True)
            wanted = "AGREE" if cache == Static() else "DIFFER"  # eight bits are a drift, told above
            assert outcome(plan, checkpoint) == wanted, plan
        if shard.rank == 0:
            print(f"AGREE on {shard.size} ranks")


if __name__ == "__main__":
    on_a_rank()

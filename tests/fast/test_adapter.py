"""LoRA in the fast model: merged into dense weights, and beside encoded ones while these stay as they are stored."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_fast import Llama, Plan, build
from llama_fast.caches.static import Static
from llama_fast.encodings.int8 import Int8
from llama_fast.model.matrices import Joined
from llama_fast.model.roofline import stored_bytes
from llama_fast.parallel.tensor_parallel import OverGroup, TensorParallel
from llama_fast.weights import low_rank_of, named_tensors
from llama_ref.checkpoint import Checkpoint, CheckpointError, open_checkpoint, save_checkpoint, with_adapter
from llama_ref.model import Llama as Reference
from llama_ref.tokenizers.tokenizer import RandomTokenizer
from oracle.questions.cases import standard_case
from oracle.questions.judge import Bench, judge
from oracle.questions.localise import first_beyond
from oracle.subjects.fast import FastSubject
from oracle.verify import references, stage_reports
from tests.fast.conftest import CONFIG
from tests.ref.lora_files import EVERY_LINEAR, write_adapter

CPU = torch.device("cpu")
TOKENS = torch.randint(101, (3, 15), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Saved:
    """A model as it was saved, its int8 twin, and an adapter of all its matrices but one."""

    dense: Path
    int8: Path
    adapter: Path


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Saved:
    tokenizer = RandomTokenizer(CONFIG.vocab_size, None, ())
    save_checkpoint(tmp_path / "dense", checkpoint.config, dict(checkpoint.weights), tokenizer=tokenizer)
    tensors = dict(named_tensors(checkpoint, Plan(Int8()), torch.float32, CPU))
    save_checkpoint(tmp_path / "int8", checkpoint.config, tensors, "int8", tokenizer)
    modules = [name for name in EVERY_LINEAR if name != "k_proj"]
    return Saved(
        tmp_path / "dense",
        tmp_path / "int8",
        write_adapter(tmp_path / "adapter", checkpoint.config, modules, rank_pattern={}, use_rslora=True),
    )


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_a_dense_model_takes_the_adapter_in(saved: Saved) -> None:
    llama = Llama.from_pretrained(saved.dense, device="cpu", adapter=saved.adapter)
    adapted = with_adapter(open_checkpoint(saved.dense), saved.adapter)
    wanted = Reference(adapted.config, adapted.weights, torch.float64)(TOKENS)
    plain = Llama.from_pretrained(saved.dense, device="cpu").runner
    assert_close(llama.runner.score(TOKENS).double(), wanted)
    assert (plain.score(TOKENS) - wanted).abs().max() > 0.05 * wanted.abs().max()
    assert stored_bytes(llama.runner.model) == stored_bytes(plain.model)
    one, two = (llama.generate([[1, 2, 3], [4, 5]], max_new_tokens=6) for _ in range(2))
    assert [row.ids for row in one] == [row.ids for row in two]


def test_an_encoding_holds_the_merged_matrix(saved: Saved) -> None:
    adapted = with_adapter(open_checkpoint(saved.dense), saved.adapter)
    found = build(adapted, Plan(Int8()), "cpu").reference_weights()["layers.1.feed_forward.w2.weight"]
    merged = adapted.weights["layers.1.feed_forward.w2.weight"][:]
    step = merged.abs().amax(1, keepdim=True) / 127
    assert ((found - merged).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("fuse", [False, True], ids=["separate", "joined"])
def test_beside_encoded_weights_the_product_is_added(saved: Saved, fuse: bool) -> None:
    """The integers stay, and the logits are those of decode(encode(w)) + scale * B A, put together by hand."""
    stored = open_checkpoint(saved.int8)
    adapted = with_adapter(stored, saved.adapter)
    runner = build(adapted, Plan(Int8(), fuse_projections=fuse), "cpu")
    merged = with_adapter(replace(stored, weights=dense_of(stored), encoding="dense"), saved.adapter)
    wanted = Reference(merged.config, merged.weights, torch.float64)(TOKENS)
    assert_close(runner.score(TOKENS).double(), wanted)
    reference = runner.reference_weights()
    for name, weight in merged.weights.items():
        torch.testing.assert_close(reference[name].double(), weight[:].double(), atol=2e-6, rtol=2e-6)
    plain = build(stored, Plan(Int8(), fuse_projections=fuse), "cpu")
    assert (plain.score(TOKENS) - wanted).abs().max() > 0.05 * wanted.abs().max()
    w2 = runner.model.blocks[1].w2
    assert w2.weight.dtype == torch.int8 and torch.equal(w2.weight, plain.model.blocks[1].w2.weight)
    assert isinstance(runner.model.blocks[0].qkv, Joined) == fuse


def dense_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return dict(build(checkpoint, Plan(Int8()), "cpu").reference_weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_oracle_agrees_beside_encoded_weights(saved: Saved, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also stage by stage in bf16, because the pair stays in float32: rounded with every product, a stage left its budget."""
    stored = open_checkpoint(saved.int8)
    adapted = with_adapter(stored, write_adapter(tmp_path / "small", stored.config, lora_alpha=2))
    runner = build(adapted, Plan(Int8(), Static(), fuse_projections=True), "cpu", dtype)
    case = standard_case(adapted.config.vocab_size, adapted.config.max_context)
    subject = FastSubject(runner, len(case.rows), case.longest)
    truth, yardstick = references(runner, adapted)
    verdict = judge(subject, Bench(truth, yardstick), case)
    assert verdict.outcome.value == "AGREE", str(verdict)
    assert first_beyond(stage_reports(subject, truth, yardstick, case.rows)) is None


class Together:
    """What ranks say to each other, as threads of one process: every rank's part is summed by all."""

    def __init__(self, size: int):
        self.barrier, self.parts = threading.Barrier(size), [torch.empty(0)] * size

    def of(self, rank: int) -> OverGroup:
        group = self

        class OfRank(OverGroup):
            def total(self, x: Tensor) -> Tensor:
                group.parts[rank] = x
                group.barrier.wait(60)
                total = torch.stack(group.parts).sum(0)
                group.barrier.wait(60)
                return total

        return OfRank()


@pytest.mark.parametrize("stored", ["dense", "int8"])
def test_two_ranks_give_the_logits_of_one(saved: Saved, stored: str) -> None:
    adapted = with_adapter(open_checkpoint(saved.dense if stored == "dense" else saved.int8), saved.adapter)
    plan = Plan(Int8(), fuse_projections=True)
    alone = build(adapted, plan, "cpu").score(TOKENS)
    group = Together(2)

    def of(rank: int) -> Tensor:
        return build(adapted, replace(plan, shard=TensorParallel(rank, 2, group.of(rank))), "cpu").score(TOKENS)

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(of, range(2)):
            assert_close(found, alone)


def test_the_pair_is_cut_as_its_matrix_is(saved: Saved) -> None:
    adapted = with_adapter(open_checkpoint(saved.int8), saved.adapter)
    ranks = [Plan(Int8(), shard=TensorParallel(rank, 2)) for rank in range(2)]
    for stem in ("layers.0.attention.wq", "layers.1.attention.wo"):
        parts = [low_rank_of(adapted, stem, plan, torch.bfloat16, CPU) for plan in (Plan(Int8()), *ranks)]
        (up, down), (up0, down0), (up1, down1) = parts  # type: ignore[misc]
        assert up.dtype == down.dtype == torch.float32
        if stem.endswith("wo"):
            assert torch.equal(down, torch.cat([down0, down1], 1)) and torch.equal(up, up1)
        else:
            assert torch.equal(up, torch.cat([up0, up1])) and torch.equal(down, down1)
    assert low_rank_of(adapted, "layers.0.attention.wk", ranks[0], torch.bfloat16, CPU) is None


def refused(action: Callable[[], object], *fragments: str) -> None:
    with pytest.raises(ValueError) as caught:
        action()
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_what_cannot_stand_beside_encoded_weights_is_refused(saved: Saved, tmp_path: Path) -> None:
    stored = open_checkpoint(saved.int8)
    adapted = with_adapter(stored, saved.adapter)
    refused(lambda: with_adapter(adapted, saved.adapter), "no second can")
    refused(lambda: dict(named_tensors(adapted, Plan(Int8()), None, CPU)), "adapt the dense model, then encode it")
    dora = write_adapter(tmp_path / "dora", stored.config, ["o_proj"], use_dora=True)
    refused(lambda: with_adapter(stored, dora), "layers.0.attention.wo with a magnitude (DoRA)", "stores as int8")
    table = write_adapter(tmp_path / "table", replace(stored.config, tie_embeddings=False), ["embed_tokens"])
    if stored.config.tie_embeddings:
        with pytest.raises(CheckpointError, match="adapts the table of embeddings, which the model stores as int8"):
            with_adapter(stored, table)
    else:
        assert not with_adapter(stored, table).low_rank  # a table that is looked up is stored as floats


def test_a_head_is_adapted_beside_an_encoded_table(saved: Saved, tmp_path: Path) -> None:
    """A tied one is then the head's own, and what is looked up stays as it was."""
    stored = open_checkpoint(saved.int8)
    head = write_adapter(tmp_path / "head", replace(stored.config, tie_embeddings=False), ["lm_head", "v_proj"])
    adapted = with_adapter(stored, head)
    merged = with_adapter(replace(stored, weights=dense_of(stored), encoding="dense"), head)
    wanted = Reference(merged.config, merged.weights, torch.float64)(TOKENS)
    assert_close(build(adapted, Plan(Int8(), fuse_projections=True), "cpu").score(TOKENS).double(), wanted)
    assert not adapted.config.tie_embeddings and set(adapted.low_rank) > {"output"}


def test_kernels_that_add_no_adapter_refuse_it(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_fast.arithmetic.pytorch import Operators

    adapted = with_adapter(open_checkpoint(saved.int8), saved.adapter)
    monkeypatch.setattr(Operators, "compilable", False)
    refused(lambda: build(adapted, Plan(Int8()), "cpu"), "the fused kernels add no adapter to int8 weights")
    build(with_adapter(open_checkpoint(saved.dense), saved.adapter), Plan(Int8()), "cpu")

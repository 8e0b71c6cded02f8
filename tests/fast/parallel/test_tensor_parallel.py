"""Cutting a model over ranks: the parts are the whole's own numbers, and no rank reads what it does not hold."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import weights
from llama_fast.build import build
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.model.roofline import stored_bytes, weight_bytes_per_step
from llama_fast.parallel.tensor_parallel import TensorParallel
from llama_fast.plan import Plan
from llama_fast.weights import encoded, named_tensors
from llama_ref.checkpoint import Checkpoint, expected_shapes, open_checkpoint, random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig

CPU = torch.device("cpu")
Parts = dict[str, dict[str, torch.Tensor]]


@st.composite
def divided(draw: st.DrawFn) -> tuple[LlamaConfig, int]:
    """A config and a number of ranks over which it divides, key heads shared by ranks or ranks by key heads."""
    size = draw(st.integers(1, 4))
    kv = draw(st.sampled_from([k for k in range(1, 9) if k % size == 0 or size % k == 0]))
    group = draw(st.sampled_from([g for g in range(1, 9) if kv * g % size == 0]))
    config = LlamaConfig(
        dim=draw(st.integers(3, 20)),
        n_layers=1,
        n_heads=kv * group,
        n_kv_heads=kv,
        head_dim=2 * draw(st.integers(1, 4)),
        ffn_dim=size * draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(5, 40)),
        max_context=16,
        tie_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )
    return config, size


def whole_and_parts(checkpoint: Checkpoint, encoding: Any, size: int) -> tuple[Parts, list[Parts]]:
    def of(plan: Plan) -> Parts:
        return {stem: stored.tensors for stem, stored in encoded(checkpoint, plan, torch.float32, CPU)}

    return of(Plan(encoding)), [of(Plan(encoding, shard=TensorParallel(rank, size))) for rank in range(size)]


def joined(stem: str, part: str, shards: list[Parts], config: LlamaConfig) -> torch.Tensor:
    """The shards put together again; of key heads that neighbours share, one."""
    several = [shard[stem][part] for shard in shards]
    if stem.endswith(("norm", "tok_embeddings")):
        return several[0]
    if stem.endswith(("wk", "wv")):
        several = several[:: max(1, len(shards) // config.n_kv_heads)]
    if stem.endswith(("wo", "w2")) and part == "bias":
        return torch.stack(several).sum(0)  # as the processes' products are
    if stem.endswith(("wo", "w2")):
        return several[0] if several[0].shape[1] == 1 and part == "scale" else torch.cat(several, 1)
    return torch.cat(several)


@given(divided(), st.sampled_from([Dense(), Int8()]))
@settings(max_examples=60)
def test_the_shards_of_every_tensor_are_the_whole(case: tuple[LlamaConfig, int], encoding: Any) -> None:
    config, size = case
    whole, shards = whole_and_parts(random_checkpoint(config, 3), encoding, size)
    for stem, parts in whole.items():
        for part, tensor in parts.items():
            again = joined(stem, part, shards, config)
            assert again.dtype == tensor.dtype and again.shape == tensor.shape, (stem, part)
            assert torch.equal(again, tensor), (stem, part)


@pytest.mark.parametrize("rank", range(2))
def test_a_scale_is_that_of_the_whole_row_however_it_is_read(
    untied: Checkpoint, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "STRIPE_BYTES", 300)  # one row at a time
    whole, _ = whole_and_parts(untied, Int8(), 2)
    reads: list[int] = []
    on_file = {name: Counted(source, reads) for name, source in untied.weights.items()}
    _, shards = whole_and_parts(dataclasses.replace(untied, weights=on_file), Int8(), 2)
    assert len(reads) > 100
    half = untied.config.ffn_dim // 2
    held = whole["layers.1.feed_forward.w2"]["weight"][:, rank * half : (rank + 1) * half]
    assert torch.equal(shards[rank]["layers.1.feed_forward.w2"]["weight"], held)
    assert torch.equal(shards[rank]["layers.1.feed_forward.w2"]["scale"], whole["layers.1.feed_forward.w2"]["scale"])


@dataclasses.dataclass
class Counted:
    """A tensor source that notes what is read of it."""

    source: Any
    reads: list[int]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype  # type: ignore[no-any-return]

    def __getitem__(self, key: Any) -> torch.Tensor:
        part = self.source[key]
        self.reads.append(part.numel() * part.element_size())
        return part  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("stored", "encoding"), [("dense", Dense()), ("dense", Int8()), ("int8", Int8())], ids=["dense", "encoded", "int8"]
)
def test_a_rank_reads_its_slices_and_at_most_a_stripe_more(
    checkpoint: Checkpoint, stored: str, encoding: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stored == "int8":
        tensors = dict(named_tensors(checkpoint, Plan(Int8()), None, CPU))
        save_checkpoint(tmp_path / "int8", checkpoint.config, tensors, "int8")
        checkpoint = open_checkpoint(tmp_path / "int8")
    stripe = 1000
    monkeypatch.setattr(weights, "STRIPE_BYTES", stripe)
    reads: list[int] = []
    watched = {name: Counted(source, reads) for name, source in checkpoint.weights.items()}
    checkpoint = dataclasses.replace(checkpoint, weights=watched)
    parts = dict(encoded(checkpoint, Plan(encoding, shard=TensorParallel(1, 2)), torch.float32, CPU))
    if stored == encoding.name:
        assert sum(reads) == sum(tensor.nbytes for stored in parts.values() for tensor in stored.tensors.values())
    else:  # scales need whole rows of the two matrices that are cut by columns: all of these is read, never at once
        shapes = expected_shapes(checkpoint.config)
        by_columns = [4 * math.prod(shapes[name]) for name in shapes if name.endswith(("wo.weight", "w2.weight"))]
        assert sum(reads) - sum(by_columns) <= sum(4 * math.prod(shape) for shape in shapes.values()) * 0.75
        table = 0 if checkpoint.config.tie_embeddings else 4 * checkpoint.config.vocab_size * checkpoint.config.dim
        assert all(n <= stripe or n == table for n in reads), "what is encoded is never whole on the host"


def test_heads_that_do_not_divide_are_refused_with_the_numbers(untied: Checkpoint) -> None:
    three = dataclasses.replace(untied.config, n_heads=6, n_kv_heads=3)
    for config, size, message in (
        (untied.config, 4, "n_heads=6 does not divide over 4 ranks"),
        (three, 2, "n_kv_heads=3 does not divide over 2 ranks"),
        (dataclasses.replace(untied.config, ffn_dim=73), 2, "ffn_dim=73 does not divide over 2 ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            build(random_checkpoint(config, 1), Plan(shard=TensorParallel(0, size)), "cpu")
    with pytest.raises(ValueError, match="rank=2 is none of 2 ranks"):
        TensorParallel(2, 2)


def test_a_shard_counts_its_own_bytes(checkpoint: Checkpoint) -> None:
    """A step reads half the matrices on each of two ranks; a tied table is kept whole and read by halves."""
    config = checkpoint.config
    whole = build(checkpoint, Plan(), "cpu").model
    shards = [build(checkpoint, Plan(shard=TensorParallel(rank, 2)), "cpu").model for rank in range(2)]
    norms = 4 * config.dim * (2 * config.n_layers + 1)
    looked_up = 0 if config.tie_embeddings else 4 * config.dim
    read = [weight_bytes_per_step(model) for model in (whole, *shards)]
    assert read[1] + read[2] == read[0] + norms + looked_up
    table = 4 * config.vocab_size * config.dim
    assert stored_bytes(shards[0]) == pytest.approx(
        table + (read[1] - looked_up) - (table / 2 if config.tie_embeddings else 0), abs=4 * config.dim
    )

"""The encoding checks what a directory of encoded weights holds: what is damaged is refused, by its name, when it is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llama_fast.build import build
from llama_fast.encodings.int4 import Int4
from llama_fast.encodings.int8 import Int8
from llama_fast.plan import Plan
from llama_fast.recipes import encoding_named, encodings
from llama_fast.weights import named_tensors
from llama_ref.checkpoint import CheckpointError, open_checkpoint, random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig

CONFIG = LlamaConfig(
    dim=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=256, vocab_size=101, max_context=64
)


def tensors(encoding: str) -> dict[str, torch.Tensor]:
    checkpoint = random_checkpoint(CONFIG, 3, "cpu", torch.float32)
    return dict(named_tensors(checkpoint, Plan(encoding_named(encoding)), None, torch.device("cpu")))


@pytest.mark.parametrize("encoding", [name for name in encodings() if name != "dense"])
def test_a_saved_encoding_computes_what_the_encoded_checkpoint_does(tmp_path: Path, encoding: str) -> None:
    save_checkpoint(tmp_path / "saved", CONFIG, tensors(encoding), encoding)
    opened = open_checkpoint(tmp_path / "saved")
    plan = Plan(encoding_named(encoding))
    ours, kept = build(random_checkpoint(CONFIG, 3, "cpu", torch.float32), plan, "cpu"), build(opened, plan, "cpu")
    ids = torch.tensor([[5, 17, 3, 88], [9, 2, 44, 0]])
    assert torch.equal(ours.score(ids), kept.score(ids))


def damaged(tmp_path: Path, encoding: str, name: str, tensor: torch.Tensor | None) -> str:
    held = tensors(encoding)
    held.pop(name)
    if tensor is not None:
        held[name] = tensor
    save_checkpoint(tmp_path / "saved", CONFIG, held, encoding)
    with pytest.raises(CheckpointError) as refusal:
        build(open_checkpoint(tmp_path / "saved"), Plan(encoding_named(encoding)), "cpu")
    return str(refusal.value)


@pytest.mark.parametrize(
    ("encoding", "name", "tensor", "told"),
    [
        ("int8", "layers.0.attention.wq.scale", None, "1 missing: layers.0.attention.wq.scale"),
        ("int8", "output.scale", torch.ones(101, 2), "output.scale is [101, 2], not [101, 1]"),
        ("int8", "output.scale", torch.ones(101, 1).int(), "output.scale is int32, not floats"),
        (
            "int4",
            "output.weight",
            torch.zeros(101, 128, dtype=torch.uint8),
            "output.weight is [101, 128], not [101, 16]",
        ),
        ("int4", "output.weight", torch.zeros(101, 16, dtype=torch.uint8), "output.weight is uint8, not int32"),
        ("int4-zero", "layers.1.feed_forward.w2.zero", None, "1 missing: layers.1.feed_forward.w2.zero"),
    ],
)
def test_a_damaged_part_is_refused_by_its_name(
    tmp_path: Path, encoding: str, name: str, tensor: torch.Tensor | None, told: str
) -> None:
    assert told in damaged(tmp_path, encoding, name, tensor)


def test_an_unknown_encoding_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "saved", CONFIG, tensors("int8"), "int3")
    with pytest.raises(ValueError, match=r"unknown encoding 'int3' \(known: dense, "):
        encoding_named(open_checkpoint(tmp_path / "saved").encoding)


def test_a_matrix_that_a_checkpoint_leaves_dense_stays_so() -> None:
    """Other people's files keep the head, or a layer, as it was."""
    held = tensors("int4")
    for part in ("weight", "scale"):
        del held[f"output.{part}"]
    held["output.weight"] = torch.randn(101, 128)
    runner = build(type(random_checkpoint(CONFIG))(CONFIG, held, None, "int4"), Plan(Int4()), "cpu")
    stored = runner.model.head
    assert stored.encoding.name == "dense" and torch.equal(stored.parts["weight"], held["output.weight"])


def test_projections_of_two_encodings_are_multiplied_one_by_one_and_it_is_said() -> None:
    held = tensors("int8")
    del held["layers.0.attention.wk.scale"]
    held["layers.0.attention.wk.weight"] = torch.randn(64, 128)
    checkpoint = type(random_checkpoint(CONFIG))(CONFIG, held, None, "int8")
    ids = torch.tensor([[5, 17, 3, 88], [9, 2, 44, 0]])
    apart = build(checkpoint, Plan(Int8()), "cpu").score(ids)
    with pytest.warns(
        UserWarning, match="1 groups of projections are not joined .* layers.0: stored as int8, dense, int8"
    ):
        runner = build(checkpoint, Plan(Int8(), fuse_projections=True), "cpu")
    torch.testing.assert_close(runner.score(ids), apart, atol=1e-5, rtol=1e-5)

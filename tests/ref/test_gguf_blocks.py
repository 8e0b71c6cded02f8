"""The blocks of GGUF's quantised types, field by field: nothing is lost or changed, and no more is read than asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_ref.checkpoint import CheckpointError
from llama_ref.formats import gguf_blocks
from llama_ref.formats.gguf_blocks import BLOCKS, block_bytes, block_fields

START, ROWS, BLOCKS_A_ROW = 7, 5, 3
QUANTISED = [kind for kind in BLOCKS if kind not in ("f16", "bf16")]


def write(path: Path, kind: str) -> torch.Tensor:
    """A file with a tensor of random bytes at START; the bytes, [ROWS, BLOCKS_A_ROW, bytes of a block]."""
    shape = ROWS, BLOCKS_A_ROW, block_bytes(kind)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    path.write_bytes(bytes(START) + raw.numpy().tobytes() + b"behind")
    return raw


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_have_the_sizes_that_the_gguf_package_says(kind: str) -> None:
    assert (BLOCKS[kind][0], block_bytes(kind)) == GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_fields_side_by_side_are_the_bytes_of_the_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gguf_blocks, "STRIPE_BYTES", 2 * BLOCKS_A_ROW * block_bytes(kind)
    )  # three stripes, the last short
    raw = write(tmp_path / "x", kind)
    fields = block_fields(kind, (ROWS, BLOCKS_A_ROW * BLOCKS[kind][0]), tmp_path / "x", START)
    held = {name: field[:] for name, field in fields.items()}
    for name, field in fields.items():
        assert tuple(held[name].shape) == field.shape and held[name].dtype is field.dtype
    again = [part.view(torch.uint8).view(ROWS, BLOCKS_A_ROW, -1) for part in held.values()]
    assert torch.equal(torch.cat(again, -1), raw)


@pytest.mark.parametrize("kind", ["q4_0", "q6_k"])
def test_a_slice_of_a_field_is_that_of_the_whole(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "x", kind)
    for field in block_fields(kind, (ROWS, BLOCKS_A_ROW * BLOCKS[kind][0]), tmp_path / "x", START).values():
        whole = field[:].view(torch.uint8)
        width = field.shape[1] // BLOCKS_A_ROW
        part = field[1:4, width : 3 * width]
        assert part.shape == (3, 2 * width) and part.is_contiguous()
        assert torch.equal(part.view(torch.uint8), field[:][1:4, width : 3 * width].contiguous().view(torch.uint8))
        assert torch.equal(field[4:].view(torch.uint8), whole[4:])
        assert field[2:2].shape == (0, field.shape[1])


def test_a_file_that_has_got_shorter_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x", "q8_0")
    field = block_fields("q8_0", (ROWS, BLOCKS_A_ROW * 32), tmp_path / "x", START)["weight"]
    (tmp_path / "x").write_bytes(bytes(40))
    with pytest.raises(CheckpointError, match="x: cannot be read as it could when it was opened"):
        field[:]

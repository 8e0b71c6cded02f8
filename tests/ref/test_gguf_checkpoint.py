"""GGUF files as other tools write them: what each of their fields and tensor types means for the model, or one clear line.

The witness of RoPE is llama.cpp's rule (src/llama-model.cpp, src/llama-context.cpp), of tensor types the gguf package.
"""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_ref.checkpoint import CheckpointError, open_checkpoint
from llama_ref.config import RopeScaling
from llama_ref.formats.gguf_file import INTEGERS
from llama_ref.formats.gguf_rope import llama3_rope_factors
from llama_ref.tokenizers.tokenizer import has_tokenizer, load_tokenizer
from tests.ref.gguf_files import byte_pair, tensors_of, with_tokens, write_gguf

ROPE = "llama.rope.scaling."


def refused(path: Path, *fragments: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    for fragment in (path.name, *fragments):
        assert fragment in str(caught.value)


# --- RoPE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "scaling"),
    [
        ({}, None),
        ({"type": "none", "factor": 4.0, "original_context_length": 32, "attn_factor": 1.0}, None),
        ({"type": "none", "yarn_ext_factor": 0.5, "alpha": 8.0}, None),
        ({"type": "linear"}, None),
        ({"type": "linear", "factor": 0.0}, None),
        ({"type": "linear", "factor": 1.0}, None),
        ({"type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"factor": 4.0}, RopeScaling("linear", 4.0)),  # no type is "linear"
        ({"type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, original_context=64)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 16},
            RopeScaling("yarn", 4.0, original_context=16),
        ),
        (
            {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_ext_factor": 1.0},
            RopeScaling("yarn", 4.0, original_context=64, beta_fast=16.0, beta_slow=2.0),
        ),
        ({"type": "yarn", "factor": 4.0, "attn_factor": 1.0}, RopeScaling("yarn", 4.0, original_context=64)),
        (
            {"type": "yarn", "factor": 4.0, "attn_factor": 0.5},
            RopeScaling("yarn", 4.0, original_context=64, attention_factor=0.5 * (1 + 0.1 * numpy.log(4.0))),
        ),
    ],
)
def test_rope_scaling_is_that_of_llama_cpp(stated: dict[str, Any], scaling: RopeScaling | None, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {ROPE + name: value for name, value in stated.items()})
    assert open_checkpoint(path).config.rope_scaling == scaling


def test_the_old_name_of_the_factor_counts_where_the_new_one_is_absent(tmp_path: Path) -> None:
    old = {"llama.rope.scale_linear": 2.0}
    assert open_checkpoint(write_gguf(tmp_path / "a.gguf", old)).config.rope_scaling == RopeScaling("linear", 2.0)
    both = old | {ROPE + "factor": 8.0}
    assert open_checkpoint(write_gguf(tmp_path / "b.gguf", both)).config.rope_scaling == RopeScaling("linear", 8.0)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"type": "longrope"}, "llama.rope.scaling.type='longrope' is not supported (known: none, linear, yarn)"),
        ({"type": "dynamic"}, "llama.rope.scaling.type='dynamic'"),
        ({"type": "yarn"}, "llama.rope.scaling.type='yarn' without llama.rope.scaling.factor"),
        ({"type": "yarn", "factor": 4.0, "yarn_ext_factor": 0.5}, "llama.rope.scaling.yarn_ext_factor=0.5"),
        ({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.75}, "llama.rope.scaling.yarn_log_multiplier=0.75"),
        ({"type": "linear", "factor": 0.5}, "factor=0.5"),
        ({"type": "linear", "factor": float("nan")}, "llama.rope.scaling.factor=nan must be a number"),
        ({"type": "linear", "factor": "x"}, "llama.rope.scaling.factor='x' must be a number"),
        ({"type": "linear", "factor": 2.0, "attn_factor": 2.0}, "llama.rope.scaling.attn_factor=2.0"),
        ({"type": "none", "attn_factor": 2.0}, "llama.rope.scaling.attn_factor=2.0"),  # llama.cpp applies it
        ({"alpha": 1000.0}, "llama.rope.scaling.alpha=1000.0"),
    ],
)
def test_rope_scaling_of_another_rule_is_refused(stated: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "m.gguf", {ROPE + name: value for name, value in stated.items()}), message)


@pytest.mark.parametrize(
    ("scaling", "theta"),
    [
        (RopeScaling("llama3", 8.0), 5e5),
        (RopeScaling("llama3", 8.0, 1.0, 4.0, 64), 1e4),
        (RopeScaling("llama3", 32.0, 2.0, 3.0, 512), 1e4),  # one blended pair
        (RopeScaling("llama3", 4.0, 1.0, 1.01, 256), 1e4),  # none
        (RopeScaling("llama3", 16.0, 1.5, 12.0, 4096), 1e5),
    ],
)
def test_factors_in_a_tensor_are_read_as_the_rule_that_made_them(
    scaling: RopeScaling, theta: float, tmp_path: Path
) -> None:
    factors = numpy.array(llama3_rope_factors(scaling, theta, 16), dtype=numpy.float32)
    tensors = tensors_of(8) | {"rope_freqs.weight": factors}
    found = open_checkpoint(write_gguf(tmp_path / "m.gguf", {"llama.rope.freq_base": theta}, tensors)).config
    assert found.rope_scaling is not None
    again = llama3_rope_factors(found.rope_scaling, theta, 16)
    assert numpy.allclose(again, factors, rtol=1e-5)


def test_factors_of_another_rule_are_refused(tmp_path: Path) -> None:
    for factors in ([1.0, 8.0, 1.0, 8.0, 8.0, 8.0, 8.0, 8.0], [0.5] * 8, [1.0] * 7 + [float("inf")], [1.0] * 4):
        tensors = tensors_of(8) | {"rope_freqs.weight": numpy.array(factors, dtype=numpy.float32)}
        refused(write_gguf(tmp_path / "m.gguf", {}, tensors), "rope_freqs.weight")
    tensors = tensors_of(8) | {"rope_freqs.weight": numpy.ones(8, dtype=numpy.float32)}
    assert open_checkpoint(write_gguf(tmp_path / "m.gguf", {}, tensors)).config.rope_scaling is None
    for kind in ("linear", "yarn"):
        path = write_gguf(tmp_path / "m.gguf", {ROPE + "type": kind, ROPE + "factor": 2.0}, tensors)
        refused(path, f"llama.rope.scaling.type='{kind}' together with rope_freqs.weight")


# --- types of tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(GGMLQuantizationType), ids=lambda kind: kind.name)
def test_a_type_is_read_as_the_gguf_package_decodes_it_or_refused_by_name(
    kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    columns, size = GGML_QUANT_SIZES[kind]
    width = 256
    draw = numpy.random.default_rng(0)
    plain = {GGMLQuantizationType.F32: numpy.float32, GGMLQuantizationType.F16: numpy.float16}
    plain |= {GGMLQuantizationType.F64: numpy.float64}
    metadata = {"llama.embedding_length": width, "llama.attention.head_count": 2}
    tensors: dict[str, Any] = {
        name: draw.standard_normal([width if extent == 32 else extent for extent in array.shape]).astype(numpy.float32)
        for name, array in tensors_of(8).items()
    }
    if kind in plain:
        stored = draw.standard_normal((64, width)).astype(plain[kind])
        tensors["blk.0.ffn_up.weight"] = stored
    else:
        stored = draw.integers(0, 60, (64, width // columns * size), dtype=numpy.uint8)
        tensors["blk.0.ffn_up.weight"] = (stored, kind)
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors)
    if kind in plain:
        expected = torch.from_numpy(stored)
    else:
        try:
            expected = torch.from_numpy(gguf.quants.dequantize(stored, kind))
        except NotImplementedError:
            why = ("not as floats",) if kind.name in INTEGERS else ("which gguf", "cannot decode")
            refused(path, f"blk.0.ffn_up.weight is stored as {kind.name}, ", *why)
            return
    found = open_checkpoint(path).weights["layers.0.feed_forward.w3.weight"][:]
    assert torch.equal(found.double(), expected.double())


def test_some_types_are_refused_and_most_are_read() -> None:
    from llama_ref.formats.gguf_file import _decodes

    read = {kind.name for kind in GGMLQuantizationType if _decodes(kind, GGML_QUANT_SIZES[kind][1])}
    assert {"F32", "F16", "BF16", "F64", "Q4_0", "Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "TQ1_0"} <= read
    assert not {"I8", "I16", "I32", "I64", "Q8_1", "Q8_K"} & read


def test_a_type_that_the_gguf_package_does_not_know_is_named_with_its_version(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    assert struct.unpack_from("<I", data, at) == (0,)
    path.write_bytes(data[:at] + struct.pack("<I", 99) + data[at + 4 :])
    refused(path, "blk.0.ffn_up.weight has the GGML type 99 (unknown), which gguf ", " does not know")


def test_a_tensor_without_extents_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight")
    path.write_bytes(data[:at] + struct.pack("<I", 0) + data[at + 4 + 8 :])
    refused(path, "output_norm.weight of shape [] cannot be read as F32")


# --- files in parts, byte orders, versions --------------------------------------------------------


def parts(folder: Path, stem: str = "m", **changes: Any) -> list[Path]:
    """A model in three parts as gguf-split writes it: all metadata and the first tensors in the first part."""
    metadata = byte_pair()
    tensors = tensors_of(len(metadata["tokenizer.ggml.tokens"]))
    names = list(tensors)
    found = []
    for number, of in enumerate((names[:2], names[2:5], names[5:])):
        told = {"split.no": number, "split.count": 3, "split.tensors.count": len(names)} | changes.get("told", {})
        path = folder / f"{stem}-{number + 1:05d}-of-00003.gguf"
        found.append(write_gguf(path, (metadata if number == 0 else {}) | told, {name: tensors[name] for name in of}))
    return found


def test_a_model_in_parts_is_read_whole_by_any_of_them(tmp_path: Path) -> None:
    metadata = byte_pair()
    whole = write_gguf(tmp_path / "whole.gguf", metadata)
    (tmp_path / "parts").mkdir()
    files = parts(tmp_path / "parts")
    wanted = open_checkpoint(whole)
    for place in (*files, tmp_path / "parts"):
        found = open_checkpoint(place)
        assert found.config == wanted.config
        assert all(torch.equal(found.weights[name][:], tensor[:]) for name, tensor in wanted.weights.items())
        assert has_tokenizer(place)
        assert load_tokenizer(place).encode("it's 2024") == load_tokenizer(whole).encode("it's 2024")


def test_a_missing_or_foreign_part_is_named(tmp_path: Path) -> None:
    files = parts(tmp_path)
    shutil.copyfile(files[1], tmp_path / "kept")
    files[1].unlink()
    refused(files[0], "the first of 3 parts, and m-00002-of-00003.gguf is not beside it")
    shutil.copyfile(files[2], files[1])
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: is not part 2 of 3"):
        open_checkpoint(files[0])
    shutil.copyfile(tmp_path / "kept", files[1])
    files[0].rename(tmp_path / "other.gguf")
    refused(tmp_path / "other.gguf", "one of 3 parts, not named as the first")


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_part_is_a_whole(count: int, tmp_path: Path) -> None:
    assert open_checkpoint(write_gguf(tmp_path / "m.gguf", {"split.count": count, "split.no": 0})).config.dim == 32


def test_another_byte_order_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", endianess=gguf.GGUFEndian.BIG)
    refused(path, "a big-endian GGUF")


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_versions(version: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(b"GGUF" + struct.pack("<I", version) + path.read_bytes()[8:])
    if version in (2, 3):
        assert open_checkpoint(path).config.dim == 32
    else:
        refused(path, f"GGUF version {version} is not supported")


@pytest.mark.parametrize("alignment", [8, 16, 64, 4096])
def test_any_alignment_is_read(alignment: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"general.alignment": alignment})
    wanted = torch.from_numpy(tensors_of(8)["blk.0.ffn_down.weight"])
    assert torch.equal(open_checkpoint(path).weights["layers.0.feed_forward.w2.weight"][:], wanted)


@pytest.mark.parametrize("alignment", [0, 3, 48])
def test_an_alignment_that_is_no_power_of_two_is_refused(alignment: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"general.alignment": 64})
    data = path.read_bytes()
    at = data.index(b"general.alignment") + len(b"general.alignment") + 4
    path.write_bytes(data[:at] + struct.pack("<I", alignment) + data[at + 4 :])
    refused(path, f"general.alignment={alignment} must be a power of two")


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"test.aaa": 1, "test.bbb": 2})
    path.write_bytes(path.read_bytes().replace(b"test.bbb", b"test.aaa"))
    refused(path, "holds 'test.aaa' twice")
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"))
    refused(path, "holds 'blk.0.attn_q.weight' twice")


# --- other models, other sizes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture='qwen2' is not a Llama"),
        ({"general.architecture": "clip"}, "general.architecture='clip'"),
        ({"general.type": "adapter"}, "general.type='adapter' is no model"),
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"llama.attention.sliding_window": 32}, "llama.attention.sliding_window=32"),
        ({"llama.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv=8.0"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale=0.5"),
        ({"llama.residual_scale": 0.5}, "llama.residual_scale=0.5"),
        ({"llama.embedding_scale": 12.0}, "llama.embedding_scale=12.0"),
        ({"llama.attention.scale": 0.015625}, "llama.attention.scale=0.015625"),
        ({"llama.attention.causal": False}, "llama.attention.causal=False"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length=8 differs"),
        ({"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}, "llama.rope.dimension_count=8 differs"),
    ],
)
def test_what_is_no_plain_llama_is_refused_by_its_field(stated: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "m.gguf", stated), message)


def test_fields_that_say_the_usual_change_nothing(tmp_path: Path) -> None:
    usual = {
        "general.type": "model",
        "general.name": "x",
        "llama.expert_count": 0,
        "llama.expert_used_count": 0,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.attention.causal": True,
        "llama.logit_scale": 1.0,
        "llama.attention.head_count_kv": [2],
        "llama.feed_forward_length": [64],
    }
    plain = open_checkpoint(write_gguf(tmp_path / "a.gguf")).config
    assert open_checkpoint(write_gguf(tmp_path / "b.gguf", usual)).config == plain


def test_the_embedding_table_says_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    words = byte_pair()
    size = len(words["tokenizer.ggml.tokens"])
    path = write_gguf(tmp_path / "m.gguf", words | {"llama.vocab_size": 32000})
    with pytest.warns(UserWarning, match=rf"llama\.vocab_size=32000 is ignored: tokens and embeddings are {size}"):
        assert open_checkpoint(path).config.vocab_size == size
    padded = write_gguf(tmp_path / "p.gguf", words | {"llama.vocab_size": size + 6}, tensors_of(size + 6))
    assert open_checkpoint(padded).config.vocab_size == size + 6  # a table may be longer than the list
    neither = write_gguf(tmp_path / "n.gguf", words | {"llama.vocab_size": size + 6}, tensors_of(size + 7))
    refused(neither, f"token_embd.weight is [{size + 7}, 32], not [{size + 6}, 32]")


def test_a_file_without_a_tokenizer_is_a_model_all_the_same(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    assert open_checkpoint(path).config.eos_ids == ()
    assert not has_tokenizer(path)


def test_ends_by_their_text_lie_within_the_table(tmp_path: Path) -> None:
    words = with_tokens(byte_pair(), {"<|im_end|>": 3}) | {"tokenizer.ggml.eos_token_id": 1}
    size = len(words["tokenizer.ggml.tokens"])
    assert open_checkpoint(write_gguf(tmp_path / "m.gguf", words)).config.eos_ids == (1, size - 1)
    less = write_gguf(tmp_path / "l.gguf", words | {"llama.vocab_size": 8}, tensors_of(8))
    assert open_checkpoint(less).config.eos_ids == (1,)

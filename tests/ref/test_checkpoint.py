"""Checkpoints: the same numbers as other readers find, in slices as in whole, or one clear error."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llama_ref.checkpoint import (
    Checkpoint,
    CheckpointError,
    TensorSource,
    expected_shapes,
    open_checkpoint,
    random_checkpoint,
    save_checkpoint,
)
from llama_ref.config import LlamaConfig, RopeScaling
from llama_ref.formats.gguf_header import read_header
from llama_ref.formats.hf_config import to_hf
from llama_ref.formats.huggingface import InterleavedRows, huggingface_name, interleave
from llama_ref.formats.saved import appears_whole, check_can_write
from llama_ref.models import Model
from llama_ref.random_weights import stable_seed
from llama_ref.weights import spans

SMALL = LlamaConfig(32, 2, 4, 2, 8, 48, 101, 256, bos_id=1, eos_ids=(2,))


def refused(action: Callable[[], object], *fragments: str) -> str:
    """The message of the CheckpointError that `action` must raise: one line that holds every fragment."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Load, change and rewrite model.safetensors. Cloned: the loaded tensors are views of the file to be replaced."""
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# --- Hugging Face directories ---------------------------------------------------------------------


def assert_same_weights(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> None:
    """By another route than the reader's: Meta's row 2i of a head is Hugging Face's row i, 2i + 1 is i + half."""
    head_dim = checkpoint.config.head_dim
    for name, weight in checkpoint.weights.items():
        theirs, ours = state[huggingface_name(name)], weight[:]
        assert tuple(weight.shape) == tuple(ours.shape) == tuple(theirs.shape)
        assert weight.dtype == ours.dtype == theirs.dtype
        if not name.endswith(("wq.weight", "wk.weight")):
            assert torch.equal(ours, theirs), name
            continue
        for head in range(0, theirs.shape[0], head_dim):
            for pair in range(head_dim // 2):
                assert torch.equal(ours[head + 2 * pair], theirs[head + pair]), name
                assert torch.equal(ours[head + 2 * pair + 1], theirs[head + head_dim // 2 + pair]), name


def test_every_tiny_llama_of_transformers_reads_the_same(witness: Any) -> None:
    from transformers import LlamaConfig as HfLlamaConfig

    checkpoint = open_checkpoint(witness.directory)
    assert checkpoint.encoding == "dense"
    assert checkpoint.path == witness.directory
    assert {name: tuple(t.shape) for name, t in checkpoint.weights.items()} == expected_shapes(checkpoint.config)
    assert_same_weights(checkpoint, witness.state)
    theirs = HfLlamaConfig.from_pretrained(witness.directory)
    ours = checkpoint.config
    assert (ours.dim, ours.n_heads, ours.n_kv_heads) == (32, 4, theirs.num_key_value_heads)
    assert (ours.head_dim, ours.tie_embeddings) == (theirs.head_dim, theirs.tie_word_embeddings)
    assert (ours.norm_eps, ours.rope_theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])
    if theirs.rope_parameters["rope_type"] == "llama3":
        assert ours.rope_scaling == RopeScaling("llama3", 8.0, original_context=64)
    assert ("output.weight" in checkpoint.weights) == (not theirs.tie_word_embeddings)


def test_shards_read_as_one_file_does(save_tiny: Any) -> None:
    sharded = save_tiny(max_shard_size="20KB")
    assert len(list(sharded.directory.glob("model-*.safetensors"))) > 2
    assert_same_weights(open_checkpoint(sharded.directory), sharded.state)


def test_bfloat16_stays_bfloat16(tiny: Any) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    edit_tensors(tiny.directory, halve)
    weight = open_checkpoint(tiny.directory).weights["layers.0.attention.wq.weight"]
    assert weight.dtype == weight[1:3].dtype == torch.bfloat16


def test_eos_ids_of_both_files_are_merged(tiny: Any) -> None:
    edit_json(tiny.directory / "config.json", eos_token_id=2)
    (tiny.directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 9]}))
    assert open_checkpoint(tiny.directory).config.eos_ids == (2, 7, 9)


ABSENT = object()


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (ABSENT, 7, (7,)),  # LlamaConfig's default is 2
        (ABSENT, [9, 7], (9, 7)),
        (ABSENT, None, ()),
        (ABSENT, ABSENT, (2,)),
        (None, ABSENT, ()),
        (None, [7], (7,)),
        ([5, 7], ABSENT, (5, 7)),
        (5, None, (5,)),
        (5, 7, (5, 7)),
    ],
)
def test_the_default_eos_is_not_joined_to_what_a_file_states(
    tiny: Any, config: Any, generation: Any, ends: Any
) -> None:
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        file = tiny.directory / name
        data = json.loads(file.read_text()) if file.is_file() else {}
        data.pop("eos_token_id", None)
        file.write_text(json.dumps(data if value is ABSENT else data | {"eos_token_id": value}))
    assert open_checkpoint(tiny.directory).config.eos_ids == ends


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["</s>", {"id": 2}, True, 2.5, [[2]]])
def test_an_eos_that_is_no_id_names_the_file(tiny: Any, name: str, value: Any) -> None:
    (tiny.directory / "generation_config.json").write_text("{}")
    edit_json(tiny.directory / name, eos_token_id=value)
    with pytest.raises(
        CheckpointError, match=f"/{name}: eos_token_id=.* must be a token id or a list of them"
    ) as caught:
        open_checkpoint(tiny.directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "field", "value", "ends"),
    [
        ("config.json", "eos_token_id", -1, ()),
        ("config.json", "eos_token_id", [101, 7, -1], (7,)),
        ("generation_config.json", "eos_token_id", [7, 32000], (7,)),
        ("config.json", "bos_token_id", -1, ()),
        ("config.json", "bos_token_id", 128000, ()),
    ],
)
def test_an_id_outside_the_vocabulary_is_left_out_and_said(
    tiny: Any, file: str, field: str, value: Any, ends: tuple[int, ...]
) -> None:
    """transformers opens such a directory, and no model can produce such an id."""
    edit_json(tiny.directory / "config.json", eos_token_id=None, bos_token_id=None)
    (tiny.directory / "generation_config.json").write_text("{}")
    edit_json(tiny.directory / file, **{field: value})
    with pytest.warns(UserWarning, match=rf"/{file}: {field} -?\d+ is outside the vocabulary of 101: ignored") as told:
        config = open_checkpoint(tiny.directory).config
    assert len(told) == 1
    assert (config.eos_ids, config.bos_id) == (ends, None)


def test_harmless_extras_and_a_duplicate_tied_table_are_dropped(save_tiny: Any) -> None:
    tied = save_tiny(tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(tied.directory, add)
    assert_same_weights(open_checkpoint(tied.directory), tied.state)


def test_an_untied_model_must_have_its_output(tiny: Any) -> None:
    edit_tensors(tiny.directory, lambda tensors: tensors.__delitem__("lm_head.weight"))
    refused(lambda: open_checkpoint(tiny.directory), "1 missing: lm_head.weight")


def test_missing_extra_and_misshapen_are_reported_together(tiny: Any) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(5, 32)
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 47)

    edit_tensors(tiny.directory, damage)
    refused(
        lambda: open_checkpoint(tiny.directory),
        "1 missing: model.norm.weight",
        "1 extra: model.layers.0.self_attn.q_proj.bias",
        "2 misshapen",
        "model.layers.1.mlp.up_proj.weight is [5, 32], not [48, 32]",
        "model.layers.1.mlp.down_proj.weight is [32, 47], not [32, 48]",
    )


def test_a_long_list_is_cut_and_counted(tiny: Any) -> None:
    edit_json(tiny.directory / "config.json", num_hidden_layers=9)
    message = refused(lambda: open_checkpoint(tiny.directory), "63 missing", "and 43 more")
    assert message.count("model.layers.") == 20


def test_truncated_file_names_the_file(tiny: Any) -> None:
    path = tiny.directory / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(lambda: open_checkpoint(tiny.directory), "model.safetensors: truncated")
    path.write_bytes(struct.pack("<Q", 10) + b"not json!!" + whole)
    refused(lambda: open_checkpoint(tiny.directory), "model.safetensors: truncated or no safetensors")


def test_missing_and_truncated_shards(save_tiny: Any) -> None:
    directory = save_tiny(max_shard_size="20KB").directory
    first, second = sorted(directory.glob("model-*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-8])
    refused(lambda: open_checkpoint(directory), f"{first.name}: truncated")
    first.unlink()
    second.unlink()
    refused(lambda: open_checkpoint(directory), "2 of", "shards missing", first.name, second.name)


def test_an_index_that_promises_too_much(save_tiny: Any) -> None:
    directory = save_tiny(max_shard_size="20KB").directory
    index = directory / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=places | {"model.ghost.weight": next(iter(places.values()))})
    refused(lambda: open_checkpoint(directory), "1 missing: model.ghost.weight")
    index.write_text("[1, 2")
    refused(lambda: open_checkpoint(directory), index.name, "JSON")


def test_a_config_that_is_no_llama_names_file_and_field(tiny: Any) -> None:
    edit_json(tiny.directory / "config.json", model_type="qwen2")
    refused(lambda: open_checkpoint(tiny.directory), "config.json", "model_type='qwen2'")
    (tiny.directory / "config.json").write_text("{")
    refused(lambda: open_checkpoint(tiny.directory), "config.json", "JSON")


def test_paths_that_hold_no_checkpoint(tmp_path: Path) -> None:
    refused(lambda: open_checkpoint(tmp_path / "nowhere"), "nowhere: no such file or directory")
    refused(lambda: open_checkpoint(tmp_path), "no config.json, params.json or .gguf")
    (tmp_path / "params.json").write_text("{}")
    refused(lambda: open_checkpoint(tmp_path), "consolidated")
    stray = tmp_path / "model.bin"
    stray.write_bytes(b"x")
    refused(lambda: open_checkpoint(stray), "must be a .gguf")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    refused(lambda: open_checkpoint(tmp_path), "holds 2 .gguf files")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(SMALL)))
    refused(lambda: open_checkpoint(tmp_path), "no weights beside it but in a.gguf, b.gguf")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).unlink()
    (tmp_path / "other.safetensors").write_bytes(b"")
    refused(lambda: open_checkpoint(tmp_path), "neither model.safetensors nor", "other.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(lambda: open_checkpoint(tmp_path), "pytorch_model.bin", "not written by torch.save")


# --- slices ---------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_interleaving_undoes_metas_own_permutation(n_heads: int, half: int, columns: int) -> None:
    """`view(heads, half, 2, D).transpose(1, 2)` is how published conversions go from Meta's order to Hugging Face's."""
    meta = torch.randn(n_heads * 2 * half, columns)
    converted = meta.view(n_heads, half, 2, columns).transpose(1, 2).reshape(meta.shape)
    assert torch.equal(interleave(converted, 2 * half), meta)


bounds = st.none() | st.integers(-60, 60)
cuts = st.builds(slice, bounds, bounds)
keys = cuts | st.tuples(cuts) | st.tuples(cuts, cuts)


def assert_slices_like_the_whole(weight: TensorSource, key: Any) -> None:
    if isinstance(key, tuple):
        key = key[: len(weight.shape)]
    part, expected = weight[key], weight[:][key]
    assert part.shape == expected.shape
    assert part.dtype == expected.dtype == weight.dtype
    assert torch.equal(part, expected)


@given(rows=st.integers(0, 70), start=bounds, stop=bounds)
def test_spans_count_as_python_does(rows: int, start: int | None, stop: int | None) -> None:
    ((first, last),) = spans(slice(start, stop), (rows,))
    assert list(range(rows))[start:stop] == list(range(first, last))


def test_spans_refuse_what_is_no_plain_slice() -> None:
    with pytest.raises(ValueError, match="step 1, not 2"):
        spans(slice(0, 4, 2), (4,))
    with pytest.raises(IndexError, match="2 slices"):
        spans((slice(None), slice(None)), (4,))
    with pytest.raises(TypeError, match="by slices, not by 3"):
        spans((3,), (4,))  # type: ignore[arg-type]


NAMES = ["tok_embeddings.weight", "layers.1.attention.wq.weight", "layers.0.feed_forward.w2.weight", "norm.weight"]


@settings(max_examples=300)
@given(name=st.sampled_from(NAMES), key=keys)
def test_any_slice_of_a_huggingface_directory_is_the_slice_of_the_whole(
    stored: Checkpoint, name: str, key: Any
) -> None:
    assert_slices_like_the_whole(stored.weights[name], key)


@settings(max_examples=300)
@given(name=st.sampled_from(NAMES), key=keys)
def test_any_slice_of_a_gguf_is_the_slice_of_the_whole(gguf_checkpoint: Checkpoint, name: str, key: Any) -> None:
    assert_slices_like_the_whole(gguf_checkpoint.weights[name], key)


@given(name=st.sampled_from(NAMES), key=keys)
def test_any_slice_of_random_weights_is_the_slice_of_the_whole(name: str, key: Any) -> None:
    assert_slices_like_the_whole(random_checkpoint(SMALL, 3).weights[name], key)


@pytest.fixture(scope="module")
def stored(save_tiny: Any) -> Checkpoint:
    return open_checkpoint(save_tiny(head_dim=24).directory)


def test_a_slice_of_q_reads_only_the_heads_it_touches() -> None:
    class Recorder:
        shape, dtype = (32, 6), torch.float32
        read: Any = None

        def __getitem__(self, key: Any, /) -> torch.Tensor:
            self.read = key
            return torch.zeros(self.shape)[key]

    recorder = Recorder()
    assert InterleavedRows(recorder, head_dim=8)[9:17, 2:3].shape == (8, 1)
    assert recorder.read == (slice(8, 24), slice(2, 3))


ROWS, COLUMNS = 1 << 16, 1 << 14  # x 4 bytes = 4 GiB, in a sparse file
OPEN_HUGE = """
import pathlib, resource, sys, torch
from llama_ref.formats.{module} import {function}
import gguf
before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensor = {function}(pathlib.Path(sys.argv[1])){tail}
assert tensor.shape == ({rows}, {columns})
part = tensor[{rows} - 3 :, 5:9]
assert torch.equal(part, torch.zeros(3, 4))
read_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
assert read_kib < 1 << 18, read_kib
"""


def run_on_sparse_file(path: Path, header: bytes, module: str, function: str, tail: str) -> None:
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * ROWS * COLUMNS)
    code = OPEN_HUGE.format(module=module, function=function, tail=tail, rows=ROWS, columns=COLUMNS)
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def test_a_slice_of_a_huge_safetensors_file_reads_only_itself(tmp_path: Path) -> None:
    entry = {"w": {"dtype": "F32", "shape": [ROWS, COLUMNS], "data_offsets": [0, 4 * ROWS * COLUMNS]}}
    text = json.dumps(entry).encode()
    header = struct.pack("<Q", len(text)) + text
    run_on_sparse_file(tmp_path / "w.safetensors", header, "safetensors_files", "open_file", "['w']")


def test_a_slice_of_a_huge_gguf_file_reads_only_itself(tmp_path: Path) -> None:
    info = struct.pack("<Q", 1) + b"w" + struct.pack("<IQQIQ", 2, COLUMNS, ROWS, 0, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info
    header += b"\0" * (-len(header) % 32)
    tail = "\nfrom llama_ref.formats.gguf_file import _map_tensors\n"
    tail += "tensor = _map_tensors(pathlib.Path(sys.argv[1]), tensor.tensors)['w']"
    run_on_sparse_file(tmp_path / "w.gguf", header, "gguf_header", "read_header", tail)


# --- GGUF -----------------------------------------------------------------------------------------

GGUF_CONFIG = LlamaConfig(64, 2, 4, 2, 16, 96, 101, 256, norm_eps=0.0078125, bos_id=1, eos_ids=(2, 7))


def write_gguf(path: Path, config: LlamaConfig = GGUF_CONFIG, **changes: Any) -> dict[str, torch.Tensor]:
    """A GGUF of random weights in several encodings, by the gguf package; returns what it dequantises them to.

    Keywords: `rope_factors`, `skip` (a stored name), `extra` (a stored name), `shape` ({stored name: shape}).
    """
    import gguf
    from gguf.constants import GGMLQuantizationType as Kind
    from gguf.quants import dequantize, quantize

    from llama_ref.formats.gguf_file import gguf_name

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_context_length(config.max_context)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    writer.add_token_list(["a", "bé", "c"])
    writer.add_float32("test.float", 0.25)
    writer.add_array("test.numbers", [3, -4, 5])
    kinds = {"wq": Kind.Q8_0, "wk": Kind.Q4_1, "wv": Kind.F16, "wo": Kind.BF16, "w1": Kind.Q4_0, "w2": Kind.Q8_0}
    values = {}
    for name, shape in expected_shapes(config).items():
        stored = gguf_name(name)
        if stored == changes.get("skip"):
            continue
        data = torch.randn(changes.get("shape", {}).get(stored, shape)).numpy()
        kind = kinds.get(name.split(".")[-2], Kind.F32)
        packed = quantize(data, kind) if kind != Kind.F32 else data
        if kind == Kind.F16:  # the writer names this type by the array's own
            writer.add_tensor(stored, packed)
        else:
            writer.add_tensor(stored, packed, raw_dtype=kind)
        values[name] = torch.from_numpy(numpy.array(dequantize(packed, kind)))
    if "rope_factors" in changes:
        writer.add_tensor("rope_freqs.weight", numpy.array(changes["rope_factors"], dtype=numpy.float32))
    if "extra" in changes:
        writer.add_tensor(changes["extra"], numpy.zeros(8, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture(scope="module")
def gguf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return open_checkpoint(path)


def test_a_gguf_reads_as_the_gguf_package_dequantises_it(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    values = write_gguf(path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == GGUF_CONFIG
    assert {name: tuple(t.shape) for name, t in checkpoint.weights.items()} == expected_shapes(GGUF_CONFIG)
    for name, weight in checkpoint.weights.items():
        assert torch.equal(weight[:].float(), values[name]), name
    dtypes = {
        name: weight.dtype for name, weight in checkpoint.weights.items() if name.startswith("layers.0.attention")
    }
    assert dtypes["layers.0.attention.wq.weight"] == torch.float32
    assert dtypes["layers.0.attention.wv.weight"] == torch.float16
    assert dtypes["layers.0.attention.wo.weight"] == torch.bfloat16
    assert open_checkpoint(tmp_path).config == GGUF_CONFIG  # the directory that holds it


def test_the_header_reads_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    header, theirs = read_header(path), GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == fields
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "bé", "c"]
    places = {t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type.value, t.data_offset) for t in theirs.tensors}
    assert {name: (p.shape, p.ggml_type, p.offset_bytes) for name, p in header.tensors.items()} == places


def test_tied_and_llama3_scaled_ggufs(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tied.gguf", skip="output.weight")
    tied = open_checkpoint(tmp_path / "tied.gguf")
    assert tied.config.tie_embeddings
    assert "output.weight" not in tied.weights
    scaling = RopeScaling("llama3", 8.0)
    from llama_ref.formats.gguf_rope import llama3_rope_factors

    write_gguf(tmp_path / "scaled.gguf", rope_factors=llama3_rope_factors(scaling, 10000.0, 16))
    assert open_checkpoint(tmp_path / "scaled.gguf").config.rope_scaling == scaling


def test_a_gguf_with_wrong_tensors_lists_them_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    write_gguf(path, skip="blk.1.attn_q.weight", extra="blk.0.attn_q.bias", shape={"output_norm.weight": (63,)})
    refused(
        lambda: open_checkpoint(path),
        "1 missing: blk.1.attn_q.weight",
        "1 extra: blk.0.attn_q.bias",
        "output_norm.weight is [63], not [64]",
    )


def test_a_truncated_gguf_is_refused_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    for length in (0, 3, 4, 20, 200, 1000, len(whole) // 2, len(whole) - 4000):
        path.write_bytes(whole[:length])
        refused(lambda: open_checkpoint(path), "tiny.gguf: ")
    path.write_bytes(b"GGUX" + whole[4:])
    refused(lambda: open_checkpoint(path), "not a GGUF file")
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + whole[8:])
    refused(lambda: open_checkpoint(path), "version 50331648")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_gguf_header_is_a_checkpoint_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "tiny.gguf"
    if not path.exists():
        write_gguf(path)
        (tmp_path / "whole").write_bytes(path.read_bytes())
    whole = bytearray((tmp_path / "whole").read_bytes())
    place = data.draw(st.integers(0, 2500))
    whole[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ids outside the vocabulary
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_the_default_model(default_model: Model) -> None:
    checkpoint = default_model.open()
    config = checkpoint.config
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads) == (576, 30, 9, 3)
    assert (config.head_dim, config.ffn_dim, config.vocab_size, config.max_context) == (64, 1536, 49152, 8192)
    assert (config.rope_theta, config.norm_eps) == (100000.0, 9.999999747378752e-06)
    # <|im_end|> is named; <|endoftext|> and <reponame> end a text by theirs, as llama.cpp has it
    assert (config.tie_embeddings, config.bos_id, config.eos_ids) == (True, 1, (2, 0, 4))
    rows = checkpoint.weights["layers.29.feed_forward.w2.weight"][100:103]
    assert rows.shape == (3, 1536)
    assert 0 < rows.abs().max() < 10


def test_transformers_reads_a_gguf_the_same(tmp_path: Path) -> None:
    """Its own conversion turns q and k into Hugging Face's order: a witness for the order in the file."""
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    as_float32 = {name: weight[:].float() for name, weight in checkpoint.weights.items()}
    assert_same_weights(Checkpoint(checkpoint.config, as_float32), theirs.state_dict())


# --- random weights -------------------------------------------------------------------------------


def test_random_weights_have_the_promised_spread() -> None:
    config = LlamaConfig(256, 2, 4, 2, 64, 512, 1000, 256)
    checkpoint = random_checkpoint(config, 5)
    assert {name: tuple(t.shape) for name, t in checkpoint.weights.items()} == expected_shapes(config)
    for name, weight in checkpoint.weights.items():
        values = weight[:]
        if len(weight.shape) == 1:
            assert values.mean().item() == pytest.approx(1.0, abs=0.03), name
            assert values.std().item() == pytest.approx(0.1, rel=0.2), name
        else:
            assert values.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.03), name
            assert values.mean().item() == pytest.approx(0.0, abs=0.002), name


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    def weight(seed: int, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return random_checkpoint(SMALL, seed, "cpu", dtype).weights[name][:]

    key = "layers.0.attention.wq.weight"
    torch.manual_seed(1)
    first = weight(3, key)
    torch.manual_seed(2)
    assert torch.equal(first, weight(3, key))
    assert not torch.equal(first, weight(4, key))
    assert not torch.equal(first, weight(3, "layers.1.attention.wq.weight"))
    assert torch.equal(first.bfloat16(), weight(3, key, torch.bfloat16))
    assert torch.equal(first.double(), weight(3, key, torch.float64))


def test_seeds_are_the_same_in_every_process() -> None:
    """Ranks agree on the weights without talking: pinned, because Python's own hash would differ by process."""
    assert stable_seed(3, "norm.weight") == 518306634911288784


# --- our own directories --------------------------------------------------------------------------


class FakeTokenizer:
    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")
        if self.broken:
            raise OSError("disk full")


def int8_tensors(config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Norms as they are; every matrix int8 with bfloat16 scales per row."""
    tensors = {}
    for name, weight in random_checkpoint(config).weights.items():
        if len(weight.shape) == 1:
            tensors[name] = weight[:]
        else:
            tensors[name] = torch.randint(-127, 128, tuple(weight.shape), dtype=torch.int8)
            tensors[name.replace(".weight", ".scale")] = torch.rand(weight.shape[0], 1).bfloat16()
    return tensors


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_directory_opens_as_it_was(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(
        32, 2, 4, 2, 8, 48, 101, 256, rope_scaling=RopeScaling("llama3", 8.0), tie_embeddings=tied, eos_ids=(2, 7)
    )
    dense = random_checkpoint(config, 1)
    save_checkpoint(tmp_path / "dense", config, dense.weights, tokenizer=FakeTokenizer())
    opened = open_checkpoint(tmp_path / "dense")
    assert (opened.config, opened.encoding) == (config, "dense")
    assert opened.weights.keys() == dense.weights.keys()
    assert all(torch.equal(opened.weights[name][:], weight[:]) for name, weight in dense.weights.items())
    assert (tmp_path / "dense" / "tokenizer.json").is_file()

    tensors = int8_tensors(config)
    save_checkpoint(tmp_path / "deep" / "int8", config, tensors, "int8")
    opened = open_checkpoint(tmp_path / "deep" / "int8")
    assert (opened.config, opened.encoding) == (config, "int8")
    assert opened.weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert opened.weights[name].dtype == tensor.dtype
        assert torch.equal(opened.weights[name][:], tensor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "dense"]


def test_what_no_config_can_say_is_not_saved(tmp_path: Path) -> None:
    """Biases are Llama's, a window is Mistral's: a directory with both could not be read again."""
    config = dataclasses.replace(SMALL, attention_bias=True, window=5)
    weights = random_checkpoint(config).weights
    refused(lambda: save_checkpoint(tmp_path / "out", config, weights), "no config.json can describe", "attention_bias")
    assert not (tmp_path / "out").exists()


def test_views_of_one_memory_are_saved_apart(tmp_path: Path) -> None:
    tensors = {name: weight[:] for name, weight in random_checkpoint(SMALL).weights.items()}
    both = torch.randn(16 + 16, 32)
    tensors["layers.0.attention.wk.weight"], tensors["layers.0.attention.wv.weight"] = both[:16], both[16:]
    tensors["layers.1.attention.wk.weight"] = tensors["layers.1.attention.wv.weight"] = both[8:24]
    tensors["layers.1.feed_forward.w1.weight"] = tensors["layers.1.feed_forward.w3.weight"]
    tensors["layers.1.attention.wq.weight"] = torch.randn(32, 32).T
    save_checkpoint(tmp_path / "out", SMALL, tensors)
    opened = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(opened.weights[name][:], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 1.1 * 4 * sum(t.numel() for t in tensors.values())


def test_an_output_directory_in_use_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    weights = random_checkpoint(SMALL).weights
    refused(lambda: save_checkpoint(tmp_path, SMALL, weights), "exists and is not empty")
    refused(lambda: save_checkpoint(tmp_path / "notes.txt", SMALL, weights), "is a file")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", SMALL, weights)
    assert open_checkpoint(tmp_path / "empty").config == SMALL


def test_a_link_to_an_empty_directory_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to(tmp_path / "deep" / "new")
    for name, place in (("link", "real"), ("dangling", "deep/new")):
        save_checkpoint(tmp_path / name, SMALL, random_checkpoint(SMALL).weights)
        assert open_checkpoint(tmp_path / place).config == open_checkpoint(tmp_path / name).config == SMALL
        assert (tmp_path / name).is_symlink() and not any((tmp_path / place).glob(".*"))


@pytest.mark.parametrize("out", [".", "link"])
def test_the_working_directory_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    target = Path(out) if out == "." else tmp_path / out
    refused(lambda: check_can_write(target), f"{target}: ", "is the working directory", "name another")
    with pytest.raises(CheckpointError, match="working directory"), appears_whole(target):
        raise AssertionError("the work has begun")
    assert list(here.iterdir()) == [] and len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_replaced_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(lambda: check_can_write(tmp_path / "notes.txt" / "deep" / "out"), "notes.txt: ", "no directory")
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: check_can_write(tmp_path / "loop"), "loop: ", "is a file")
    (tmp_path / "volume").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
        refused(lambda: check_can_write(tmp_path / "volume"), "volume: ", "is a mount point")
        check_can_write(tmp_path / "volume" / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        refused(lambda: check_can_write(tmp_path / "deep" / "out"), f"{tmp_path}: ", "may not be written")


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "out", SMALL, random_checkpoint(SMALL).weights, tokenizer=FakeTokenizer(broken=True))
    tensors = int8_tensors(SMALL)
    del tensors["norm.weight"]
    tensors["layers.7.attention.wq.scale"] = torch.ones(101, 2)
    fragments = ("1 missing: norm.weight", "1 extra: layers.7.attention.wq.scale")
    refused(lambda: save_checkpoint(tmp_path / "out", SMALL, tensors, "int8"), *fragments)
    assert list(tmp_path.iterdir()) == []


def test_damaged_saved_directories_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_checkpoint(out, SMALL, int8_tensors(SMALL), "int8")
    edit_tensors(out, lambda tensors: tensors.__delitem__("layers.0.attention.wq.scale"))
    edit_json(out / "config.json", llama_fast={"encoding": ["int8"], "format": 1})
    refused(lambda: open_checkpoint(out), "its encoding is ['int8'], not a name")
    edit_json(out / "config.json", llama_fast={"encoding": "int8", "format": 2})
    refused(lambda: open_checkpoint(out), "format 2", "reads format 1")
    edit_json(out / "config.json", llama_fast={"encoding": "dense", "format": 1})
    refused(lambda: open_checkpoint(out), "extra: ")


def test_integers_in_a_dense_directory_are_refused(tmp_path: Path) -> None:
    tensors = {name: weight[:] for name, weight in random_checkpoint(SMALL).weights.items()}
    tensors["output.weight"] = tensors["output.weight"].to(torch.int8)
    refused(lambda: save_checkpoint(tmp_path / "out", SMALL, tensors), "not floating point", "output.weight")

"""Which files hold the weights, under which names, and what is said of the rest; transformers reads the same directories."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_ref.checkpoint import Checkpoint, CheckpointError, open_checkpoint, random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.convert import convert
from llama_ref.formats.gguf_file import gguf_name
from llama_ref.formats.weight_files import ORDER
from llama_ref.model import Llama

SINGLE, INDEX, PICKLE, PICKLE_INDEX = ORDER
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
State = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def of_transformers(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


def assert_answers_as_transformers(directory: Path) -> None:
    """Logits of two rows of unequal length."""
    checkpoint = open_checkpoint(directory)
    ours, theirs = Llama(checkpoint.config, checkpoint.weights, torch.float64), of_transformers(directory).double()
    for row in ([[3, 1, 4, 1, 5, 9, 2, 6]], [[27, 18, 28]]):
        with torch.no_grad():
            torch.testing.assert_close(ours(torch.tensor(row)), theirs(torch.tensor(row)).logits, rtol=1e-4, atol=1e-4)


def refused(path: Path, *fragments: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and all(fragment in message for fragment in fragments), message


def said(path: Path, *fragments: str) -> Checkpoint:
    """The checkpoint, which must open with one warning of one line that holds every fragment."""
    with pytest.warns(UserWarning) as told:
        checkpoint = open_checkpoint(path)
    assert len(told) == 1, [str(warning.message) for warning in told]
    message = str(told[0].message)
    assert "\n" not in message and all(fragment in message for fragment in fragments), message
    return checkpoint


def state_of(directory: Path) -> State:
    return {name: tensor.clone() for name, tensor in load_file(directory / SINGLE).items()}


def rewrite(directory: Path, change: Callable[[State], object]) -> State:
    """Change model.safetensors; what it holds now."""
    state = state_of(directory)
    change(state)
    save_file(state, directory / SINGLE, metadata={"format": "pt"})
    return state


def write_weights(directory: Path, name: str, state: State) -> None:
    """Weights under one of the four names that are read; an index with its two shards."""
    if not name.endswith(".json"):
        save_file(state, directory / name, metadata={"format": "pt"}) if name == SINGLE else torch.save(
            state, directory / name
        )
        return
    stem, end = ("model", "safetensors") if name == INDEX else ("pytorch_model", "bin")
    places = {}
    for number in range(2):
        shard = f"{stem}-0000{number + 1}-of-00002.{end}"
        part = {key: tensor for i, (key, tensor) in enumerate(state.items()) if i % 2 == number}
        save_file(part, directory / shard, metadata={"format": "pt"}) if end == "safetensors" else torch.save(
            part, directory / shard
        )
        places |= dict.fromkeys(part, shard)
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))


# --- which file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [choice for choice in product((False, True), repeat=4) if any(choice)])
def test_the_file_that_is_read_is_the_one_of_transformers(there: tuple[bool, ...], tiny: Any) -> None:
    state = state_of(tiny.directory)
    (tiny.directory / SINGLE).unlink()
    names = [name for name, is_there in zip(ORDER, there) if is_there]
    for name in names:
        marked = state | {"model.norm.weight": torch.full((32,), 1.0 + ORDER.index(name))}
        write_weights(tiny.directory, name, marked)
    checkpoint = said(tiny.directory, *names, "left out") if names[1:] else open_checkpoint(tiny.directory)
    ours = checkpoint.weights["norm.weight"][:]
    assert ours[0] == 1 + ORDER.index(names[0])
    assert torch.equal(ours, of_transformers(tiny.directory).model.norm.weight)


def test_a_save_as_one_file_over_shards_is_what_is_read(save_tiny: Any) -> None:
    """As save_pretrained leaves it: the shards are gone, their index is not."""
    directory = save_tiny(max_shard_size="20KB").directory
    newer = save_tiny()
    for shard in directory.glob("model-*.safetensors"):
        shard.unlink()
    shutil.copyfile(newer.directory / SINGLE, directory / SINGLE)
    read = said(directory, f"{SINGLE} is read", INDEX)
    assert torch.equal(read.weights["norm.weight"][:], newer.state["model.norm.weight"])
    assert torch.equal(read.weights["output.weight"][:], newer.state["lm_head.weight"])


def test_an_index_that_the_hub_gave_without_its_files_is_not_spoken_of(tiny: Any) -> None:
    (tiny.directory / PICKLE_INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "pytorch_model-1.bin"}}))
    assert open_checkpoint(tiny.directory).config.dim == 32


def test_a_variant_alone_is_refused_by_its_name(tiny: Any) -> None:
    for name in ("model.fp16.safetensors", "pytorch_model.fp16.bin", "consolidated.safetensors"):
        (tiny.directory / SINGLE).rename(tiny.directory / name)
        refused(tiny.directory, "neither model.safetensors nor", f"found {name}")
        (tiny.directory / name).rename(tiny.directory / SINGLE)


def test_an_adapter_beside_a_model_is_not_read_and_it_is_said(tiny: Any) -> None:
    save_file(
        {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}, tiny.directory / "adapter_model.safetensors"
    )
    said(tiny.directory, f"{SINGLE} is read; adapter_model.safetensors left out")
    (tiny.directory / SINGLE).unlink()
    refused(tiny.directory, "neither model.safetensors nor", "found adapter_model.safetensors")
    (tiny.directory / "config.json").unlink()
    refused(tiny.directory, "no config.json", "found adapter_model.safetensors")


def test_a_gguf_beside_a_config_alone_is_asked_for_by_its_name(tiny: Any) -> None:
    (tiny.directory / SINGLE).unlink()
    (tiny.directory / "m.gguf").write_bytes(b"GGUF")
    refused(tiny.directory, "no weights beside it but in m.gguf: name the .gguf file")
    (tiny.directory / "config.json").write_text(json.dumps({"model_type": "llama"}))  # as repositories of GGUFs have it
    refused(tiny.directory, "no weights beside it but in m.gguf: name the .gguf file")


def test_mistrals_own_file_is_named_where_it_is_all_there_is(tiny: Any) -> None:
    (tiny.directory / SINGLE).rename(tiny.directory / "consolidated.safetensors")
    (tiny.directory / "config.json").rename(tiny.directory / "params.json")
    refused(tiny.directory, "neither consolidated.00.pth nor model.pth", "found consolidated.safetensors")


@pytest.mark.parametrize("name", [SINGLE, PICKLE, "m.gguf"])
def test_a_pointer_that_git_lfs_left_is_told_as_one(tiny: Any, name: str) -> None:
    (tiny.directory / SINGLE).unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
    (tiny.directory / name).write_text(pointer)
    place = tiny.directory / name if name.endswith("gguf") else tiny.directory
    refused(place, f"{name}: a Git LFS pointer, not the file itself", "`git lfs pull`")


def test_a_pickle_that_is_refused_comes_with_no_advice_to_trust_it(tiny: Any) -> None:
    (tiny.directory / SINGLE).unlink()
    torch.save({"x": Path("x")}, tiny.directory / PICKLE)
    refused(tiny.directory, f"{PICKLE}: refused, or not written by torch.save (Unsupported global: GLOBAL pathlib")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tiny.directory)
    assert "Re-running" not in str(caught.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_config_may_name_the_file(tiny: Any, tmp_path: Path, sharded: bool) -> None:
    state = state_of(tiny.directory)
    write_weights(tiny.directory, INDEX if sharded else SINGLE, state | {"model.norm.weight": torch.full((32,), 7.0)})
    named = "other.safetensors.index.json" if sharded else "other.safetensors"
    (tiny.directory / (INDEX if sharded else SINGLE)).rename(tiny.directory / named)
    config = json.loads((tiny.directory / "config.json").read_text())
    (tiny.directory / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
    for _ in range(2):
        assert open_checkpoint(tiny.directory).weights["norm.weight"][0:1] == 7.0
        assert of_transformers(tiny.directory).model.norm.weight[0] == 7.0
        save_file(state, tiny.directory / SINGLE, metadata={"format": "pt"})  # beside it: still not read
    convert(tiny.directory, tmp_path / "out", "hf")
    assert open_checkpoint(tmp_path / "out").weights["norm.weight"][0:1] == 7.0
    assert of_transformers(tmp_path / "out").model.norm.weight[0] == 7.0
    for odd in ("../other.safetensors", "pytorch_model.bin", 3, "/etc/passwd.safetensors"):
        (tiny.directory / "config.json").write_text(json.dumps(config | {"transformers_weights": odd}))
        refused(tiny.directory, "config.json: transformers_weights=")
    (tiny.directory / "config.json").write_text(json.dumps(config | {"transformers_weights": "gone.safetensors"}))
    refused(tiny.directory, "gone.safetensors: no such file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": None}, "has no weight_map of file names"),
        ({"weight_map": {}}, "its weight_map names no tensor"),
        ({"weight_map": {"model.norm.weight": None}}, "has no weight_map of file names"),
        ({"weight_map": {"model.norm.weight": "sub/model.safetensors"}}, "is no file of this directory"),
        ({}, "has no weight_map of file names"),
        ([], "holds no JSON object"),
    ],
)
@pytest.mark.parametrize("index", [INDEX, PICKLE_INDEX])
def test_an_index_that_says_nothing_is_named(tiny: Any, index: str, content: Any, message: str) -> None:
    (tiny.directory / SINGLE).unlink()
    (tiny.directory / index).write_text(json.dumps(content))
    refused(tiny.directory, index, message)


@pytest.mark.parametrize("index", [INDEX, PICKLE_INDEX])
def test_an_empty_shard_is_named(tiny: Any, index: str) -> None:
    write_weights(tiny.directory, index, state_of(tiny.directory))
    (tiny.directory / SINGLE).unlink()
    shard = sorted(tiny.directory.glob("*model-*"))[0]
    shard.write_bytes(b"")
    refused(tiny.directory, f"{shard.name}: ")


@pytest.mark.parametrize("older", ["model-0.safetensors", "model-9.safetensors"])
def test_a_tensor_in_two_shards_is_the_one_of_the_index(tiny: Any, older: str) -> None:
    """transformers 5.24 takes that of the shard that comes last by name, whatever the index says."""
    state = state_of(tiny.directory)
    (tiny.directory / SINGLE).unlink()
    save_file(state, tiny.directory / "model-5.safetensors", metadata={"format": "pt"})
    stale = {"model.norm.weight": torch.full((32,), 9.0), "lm_head.weight": torch.zeros(101, 32)}
    save_file(stale | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tiny.directory / older)
    places = dict.fromkeys(state, "model-5.safetensors")
    places["model.layers.0.self_attn.rotary_emb.inv_freq"] = older
    (tiny.directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    read = said(tiny.directory, "and 1 more stand in several shards", INDEX)
    assert torch.equal(read.weights["norm.weight"][:], state["model.norm.weight"])
    del places["model.norm.weight"]
    (tiny.directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    refused(tiny.directory, "model.norm.weight stands in several shards")


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORDER)
def test_files_of_the_hubs_cache_are_links_to_blobs(tiny: Any, tmp_path: Path, name: str) -> None:
    state = state_of(tiny.directory)
    (tiny.directory / SINGLE).unlink()
    write_weights(tiny.directory, name, state)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0f", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(tiny.directory.iterdir())):
        shutil.move(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    assert torch.equal(open_checkpoint(snapshot).weights["norm.weight"][:], state["model.norm.weight"])
    (snapshot / name).resolve().unlink()
    refused(snapshot, f"{name} is a link to ../../blobs/", "which is not there")


@pytest.mark.parametrize("folder", ["with space", "naïve 日本 🙂", "-x", "a'b\"c", "%s {0}"])
def test_any_name_of_a_directory_will_do(tiny: Any, tmp_path: Path, folder: str) -> None:
    state = state_of(tiny.directory)
    for name in ORDER:
        place = tmp_path / name / folder
        place.mkdir(parents=True)
        shutil.copyfile(tiny.directory / "config.json", place / "config.json")
        write_weights(place, name, state)
        assert torch.equal(open_checkpoint(place).weights["norm.weight"][:], state["model.norm.weight"])
    convert(place, tmp_path / "meta" / folder, "meta")
    convert(tmp_path / "meta" / folder, tmp_path / "hf" / folder, "hf")
    assert state_of(tmp_path / "hf" / folder).keys() == state.keys()


# --- tied tables ----------------------------------------------------------------------------------


def in_every_layout(directory: Path, to: Path, drop: str) -> dict[str, Path]:
    """A tied model as every layout stores it, without the table that `drop` names ("embeddings", "output" or "")."""
    checkpoint = open_checkpoint(directory)
    table = checkpoint.weights["tok_embeddings.weight"][:]
    hf = state_of(directory) | {EMBEDDINGS: table.clone(), HEAD: table.clone()}
    hf.pop({"embeddings": EMBEDDINGS, "output": HEAD}.get(drop, ""), None)
    places = {}
    for name in ORDER:
        places[name] = to / name
        places[name].mkdir()
        shutil.copyfile(directory / "config.json", places[name] / "config.json")
        write_weights(places[name], name, hf)
    meta = {name: tensor[:].clone() for name, tensor in checkpoint.weights.items()} | {"output.weight": table}
    meta["tok_embeddings.weight"] = table
    meta.pop({"embeddings": "tok_embeddings.weight", "output": "output.weight"}.get(drop, ""), None)
    for name in ("consolidated.00.pth", "model.pth"):
        places[name] = to / name
        places[name].mkdir()
        shutil.copyfile(directory / "config.json", places[name] / "config.json")
        torch.save(meta, places[name] / name)
    places["ours"] = to / "ours"
    save_checkpoint(places["ours"], checkpoint.config, checkpoint.weights)
    save_file({name: tensor.clone() for name, tensor in meta.items()}, places["ours"] / SINGLE)
    return places


@pytest.mark.parametrize("drop", ["", "embeddings", "output"])
def test_a_tied_table_is_found_under_either_name_in_every_layout(save_tiny: Any, tmp_path: Path, drop: str) -> None:
    tied = save_tiny(tie_word_embeddings=True)
    wanted = open_checkpoint(tied.directory)
    for layout, place in in_every_layout(tied.directory, tmp_path, drop).items():
        read = open_checkpoint(place)
        assert read.config == wanted.config and read.config.tie_embeddings, layout
        assert read.weights.keys() == wanted.weights.keys(), layout
        for name, tensor in wanted.weights.items():
            assert torch.equal(read.weights[name][:], tensor[:]), (layout, name)
        if layout in ORDER:
            assert torch.equal(of_transformers(place).lm_head.weight, wanted.weights["tok_embeddings.weight"][:])


@pytest.mark.parametrize("layout", [*ORDER, "consolidated.00.pth", "model.pth", "ours"])
def test_two_tables_that_differ_are_both_read_and_it_is_said(save_tiny: Any, tmp_path: Path, layout: str) -> None:
    tied = save_tiny(tie_word_embeddings=True)
    place = in_every_layout(tied.directory, tmp_path, "")[layout]
    other = torch.randn(101, 32)
    if layout in (SINGLE, "ours"):
        rewrite(place, lambda state: state.update({HEAD if layout == SINGLE else "output.weight": other}))
    else:
        for file in (*place.glob("*.bin"), *place.glob("*.pth"), *place.glob("model-*.safetensors")):
            pickled = file.suffix != ".safetensors"
            state = torch.load(file) if pickled else load_file(file)
            found = {name: other.clone() if name in (HEAD, "output.weight") else t.clone() for name, t in state.items()}
            torch.save(found, file) if pickled else save_file(found, file, metadata={"format": "pt"})
    read = said(place, "tie_word_embeddings is true", "differs from", "both are read")
    assert not read.config.tie_embeddings
    assert torch.equal(read.weights["output.weight"][:], other)
    assert torch.equal(read.weights["tok_embeddings.weight"][:], tied.state[EMBEDDINGS])
    if layout in ORDER:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_answers_as_transformers(place)
            for to in ("hf", "meta"):
                convert(place, tmp_path / "out" / to, to)
                again = open_checkpoint(tmp_path / "out" / to)
                assert again.config == read.config and torch.equal(again.weights["output.weight"][:], other)


def test_an_int8_table_is_found_under_either_name(tmp_path: Path) -> None:
    config = LlamaConfig(32, 1, 4, 2, 8, 48, 101, 256, tie_embeddings=True)
    tensors = {name: tensor[:] for name, tensor in random_checkpoint(config).weights.items()}
    tensors["tok_embeddings.weight"] = torch.randint(-127, 128, (101, 32), dtype=torch.int8)
    tensors["tok_embeddings.scale"] = torch.rand(101, 1)
    save_checkpoint(tmp_path / "m", config, tensors, "int8")
    renamed = {name.replace("tok_embeddings", "output"): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "m" / SINGLE)
    read = open_checkpoint(tmp_path / "m")
    assert read.config == config and read.weights.keys() == tensors.keys()
    doubled = renamed | {name: tensors[name] for name in ("tok_embeddings.weight", "tok_embeddings.scale")}
    save_file({name: tensor.clone() for name, tensor in doubled.items()}, tmp_path / "m" / SINGLE)
    assert open_checkpoint(tmp_path / "m").weights.keys() == tensors.keys()
    doubled["output.scale"] = doubled["output.scale"] * 2
    save_file({name: tensor.clone() for name, tensor in doubled.items()}, tmp_path / "m" / SINGLE)
    assert not said(tmp_path / "m", "differs from").config.tie_embeddings


@pytest.mark.parametrize("drop", ["embeddings", "output"])
def test_params_and_ggufs_say_by_one_table_that_they_are_tied(save_tiny: Any, tmp_path: Path, drop: str) -> None:
    """Of `output.weight` alone this is a guess, so it is said."""
    source = save_tiny(tie_word_embeddings=True, rms_norm_eps=1e-5, max_position_embeddings=4096).directory
    convert(source, tmp_path / "meta", "meta")
    (tmp_path / "meta" / "config.json").unlink()
    state = torch.load(tmp_path / "meta" / "consolidated.00.pth")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    del state["tok_embeddings.weight" if drop == "embeddings" else "output.weight"]
    torch.save(state, tmp_path / "meta" / "consolidated.00.pth")
    write_gguf(tmp_path / "m.gguf", state)
    for path in (tmp_path / "meta", tmp_path / "m.gguf"):
        read = said(path, "output.weight is read as both tables") if drop == "embeddings" else open_checkpoint(path)
        assert read.config.tie_embeddings and "output.weight" not in read.weights
        assert torch.equal(read.weights["tok_embeddings.weight"][:], state_of(source)[EMBEDDINGS])


def write_gguf(path: Path, state: State) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 2),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_feed_forward_length, 48),
        (writer.add_context_length, 64),
        (writer.add_vocab_size, 101),
    ):
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, tensor in state.items():
        writer.add_tensor(gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"model.{name}",
        lambda name: name.removeprefix("model.") if "layers.1" in name else name,
    ],
    ids=["alone", "inside another", "in part"],
)
def test_names_of_a_base_model_are_read_as_transformers_reads_them(
    save_tiny: Any, rename: Callable[[str], str], tied: bool
) -> None:
    directory = save_tiny(tie_word_embeddings=tied).directory
    rewrite(directory, lambda state: [state.update({rename(name): state.pop(name)}) for name in list(state)])
    assert_answers_as_transformers(directory)


def test_a_base_model_saved_without_its_head(save_tiny: Any, tmp_path: Path) -> None:
    """Tied it is whole. Untied transformers would draw a head at random, and we refuse."""
    for tied in (True, False):
        source = save_tiny(tie_word_embeddings=tied).directory
        of_transformers(source).model.save_pretrained(tmp_path / str(tied))
        assert EMBEDDINGS not in state_of(tmp_path / str(tied))
    assert_answers_as_transformers(tmp_path / "True")
    refused(tmp_path / "False", "1 missing: lm_head.weight; ", "only if config.json says tie_word_embeddings")


def test_two_names_of_one_tensor_are_not_chosen_between(tiny: Any) -> None:
    rewrite(tiny.directory, lambda state: state.update({"norm.weight": torch.ones(32)}))
    refused(tiny.directory, "1 extra: norm.weight")

    def twice(state: State) -> None:
        state["model.model.norm.weight"] = state.pop("model.norm.weight")

    rewrite(tiny.directory, twice)
    refused(tiny.directory, "1 extra: ")


def test_buffers_that_follow_from_the_config_are_left_out(tiny: Any) -> None:
    names = [f"model.layers.0.self_attn.{name}" for name in ("masked_bias", "bias", "rotary_emb.cos_cached")]
    names += ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq", "model.causal_mask"]
    rewrite(tiny.directory, lambda state: state.update({name: torch.ones(4, dtype=torch.uint8) for name in names}))
    assert_answers_as_transformers(tiny.directory)


@pytest.mark.parametrize(
    "name",
    [
        *("lm_head.bias", "score.weight", "model.layers.0.self_attn.q_proj.weight_scale"),
        *(
            "model.layers.0.mlp.up_proj.qweight",
            "model.layers.2.mlp.up_proj.weight",
            "model.layers.0.self_attn.q_norm.weight",
        ),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_its_name(tiny: Any, name: str) -> None:
    rewrite(tiny.directory, lambda state: state.update({name: torch.ones(4)}))
    refused(tiny.directory, f"1 extra: {name}")


# --- kinds of numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.bool])
def test_what_is_not_stored_as_floats_is_refused_by_its_name(tiny: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    """transformers reads such numbers as if they were the weights; without their scale they are not."""
    kind = str(dtype).removeprefix("torch.")
    convert(tiny.directory, tmp_path / "meta", "meta")
    checkpoint = open_checkpoint(tiny.directory)
    save_checkpoint(tmp_path / "ours", checkpoint.config, checkpoint.weights)
    meta = torch.load(tmp_path / "meta" / "consolidated.00.pth")
    name = "layers.0.feed_forward.w1.weight"
    meta[name] = meta[name].to(dtype)
    torch.save(meta, tmp_path / "meta" / "consolidated.00.pth")
    refused(tmp_path / "meta", f"{name} is stored as {kind}, not as floats")
    save_file({key: tensor.clone() for key, tensor in meta.items()}, tmp_path / "ours" / SINGLE)
    refused(tmp_path / "ours", f"not floating point, in encoding 'dense': {name} ({kind})")
    name = "model.layers.0.mlp.gate_proj.weight"
    state = rewrite(tiny.directory, lambda state: state.update({name: state[name].to(dtype)}))
    refused(tiny.directory, f"{name} is stored as {kind}, not as floats")
    (tiny.directory / SINGLE).unlink()
    torch.save(state, tiny.directory / PICKLE)
    refused(tiny.directory, f"{name} is stored as {kind}, not as floats")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_every_width_may_stand_together(tiny: Any, dtype: torch.dtype) -> None:
    rewrite(tiny.directory, lambda state: state.update({HEAD: state[HEAD].to(dtype)}))
    assert open_checkpoint(tiny.directory).weights["output.weight"].dtype == dtype


def test_integers_in_a_gguf_are_refused_by_name(tmp_path: Path, tiny: Any) -> None:
    state = {name: tensor[:] for name, tensor in open_checkpoint(tiny.directory).weights.items()}
    name = "layers.1.attention.wv.weight"
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        write_gguf(tmp_path / "m.gguf", state | {name: state[name].to(dtype)})
        refused(tmp_path / "m.gguf", f"blk.1.attn_v.weight is stored as I{8 * dtype.itemsize}, not as floats")


def test_weights_saved_without_their_numbers_are_refused(tiny: Any) -> None:
    state = state_of(tiny.directory)
    (tiny.directory / SINGLE).unlink()
    torch.save(state | {HEAD: state[HEAD].to("meta")}, tiny.directory / PICKLE)
    refused(tiny.directory, "'lm_head.weight' was saved without its numbers (device meta)")


# --- what we write --------------------------------------------------------------------------------


WRITES = """
import os, sys
from pathlib import Path
from llama_ref.checkpoint import open_checkpoint, save_checkpoint
from llama_ref.convert import convert
from llama_ref.cache_folder import store
from llama_ref.tokenizers.tokenizer import RandomTokenizer
source = Path(sys.argv[1])
for to in map(Path, sys.argv[2:]):
    os.umask(int(to.name, 8))
    checkpoint = open_checkpoint(source)
    save_checkpoint(to / "saved", checkpoint.config, checkpoint.weights, tokenizer=RandomTokenizer(101, None, ()))
    convert(source, to / "hf", "hf")
    convert(source, to / "sharded", "hf", shard_bytes=20_000)
    convert(source, to / "meta", "meta")
    store(to / "cache" / "key", {"tokenizer.json": "x"})
"""


def test_every_file_that_is_written_has_the_mode_of_the_users_umask(tiny: Any, tmp_path: Path) -> None:
    """In a process of its own, as the umask is the process's."""
    targets = {umask: tmp_path / f"{umask:o}" for umask in (0o022, 0o027, 0o077, 0o002)}
    command = [sys.executable, "-c", WRITES, str(tiny.directory), *map(str, targets.values())]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for umask, to in targets.items():
        found = {path: stat.S_IMODE(path.stat().st_mode) for path in to.rglob("*")}
        assert len([path for path in found if path.suffix in (".safetensors", ".pth")]) > 4
        wrong = {
            str(path): oct(mode) for path, mode in found.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask
        }
        assert not wrong


def test_an_empty_directory_keeps_its_own_mode(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    convert(tiny.directory, tmp_path / "out", "hf")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700 and state_of(tmp_path / "out")


def test_the_command_says_what_is_left_out_in_one_line(tiny: Any, tmp_path: Path) -> None:
    (tiny.directory / PICKLE).write_bytes(b"not read")
    command = [sys.executable, "-m", "llama_fast.ladder.cli", "convert", str(tiny.directory), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"warning: {tiny.directory}: {SINGLE} is read; {PICKLE} left out\n"

"""Layouts other than safetensors: what they refuse, loss-free conversion, and the hub's own cache and environment."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_ref.checkpoint import Checkpoint, CheckpointError, open_checkpoint, random_checkpoint, save_checkpoint
from llama_ref.config import NAMED, LlamaConfig, RopeScaling
from llama_ref.convert import convert
from llama_ref.formats.gguf_file import gguf_name
from llama_ref.formats.gguf_header import read_header
from llama_ref.formats.hf_config import to_hf
from llama_ref.formats.meta_config import from_meta, to_meta
from llama_ref.formats.meta_layout import Merged
from llama_ref.models import Model, resolve
from llama_ref.tokenizers.tokenizer import RandomTokenizer, has_tokenizer, load_tokenizer
from llama_ref.tokenizers.tokenizer_files import TokenizerError

REPOSITORY = Path(__file__).parents[2]


def refused(action: Callable[[], object], *fragments: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and all(fragment in message for fragment in fragments), message


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture
def pickled(tiny: Any) -> Path:
    """The tiny model as pytorch_model.bin."""
    torch.save(state_of(tiny.directory), tiny.directory / "pytorch_model.bin")
    (tiny.directory / "model.safetensors").unlink()
    return tiny.directory  # type: ignore[no-any-return]


# --- pickles --------------------------------------------------------------------------------------


class Evil:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.witness}",)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(pickled: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    torch.save({"model.norm.weight": Evil(witness)}, pickled / "pytorch_model.bin")
    refused(lambda: open_checkpoint(pickled), "pytorch_model.bin", "refused")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({1: torch.ones(2)}, "holds a dict"),
        ({"model.norm.weight": 3}, "is a int, not a tensor"),
        ({"model.norm.weight": torch.eye(3).to_sparse()}, "not as plain numbers"),
    ],
)
def test_other_content_is_refused(pickled: Path, content: Any, message: str) -> None:
    torch.save(content, pickled / "pytorch_model.bin")
    refused(lambda: open_checkpoint(pickled), message)


def test_a_missing_shard_of_an_index_is_named(pickled: Path) -> None:
    places = {"model.norm.weight": "pytorch_model-00001-of-00002.bin"}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    (pickled / "pytorch_model.bin").unlink()
    refused(lambda: open_checkpoint(pickled), "1 of 1 shards missing", "pytorch_model-00001")


@pytest.mark.parametrize("place", ["../pytorch_model.bin", "/etc/passwd", ""])
def test_an_index_that_points_elsewhere_is_refused(pickled: Path, place: str) -> None:
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": place}}))
    (pickled / "pytorch_model.bin").rename(pickled.parent / "pytorch_model.bin")
    refused(lambda: open_checkpoint(pickled), "no file of this directory")


def test_safetensors_come_before_pickles(tiny: Any) -> None:
    (tiny.directory / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.warns(UserWarning, match=r"model\.safetensors is read; pytorch_model\.bin left out"):
        assert open_checkpoint(tiny.directory).config.dim == 32


# --- Meta and gpt-fast ----------------------------------------------------------------------------


@pytest.fixture
def meta(save_tiny: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A tiny model in both layouts; Meta's without the config.json that `convert` puts beside."""
    source = save_tiny(num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=4096).directory
    convert(source, tmp_path / "meta")
    (tmp_path / "meta" / "config.json").unlink()
    return source, tmp_path / "meta"


def test_params_json_alone_is_config_enough(meta: tuple[Path, Path]) -> None:
    source, directory = meta
    params = json.loads((directory / "params.json").read_text())
    (directory / "params.json").write_text(json.dumps(params | {"vocab_size": -1, "use_biases": False}))
    ours, theirs = open_checkpoint(directory), open_checkpoint(source)
    assert ours.config == theirs.config
    for name, tensor in theirs.weights.items():
        assert torch.equal(ours.weights[name][:], tensor[:]), name


def test_a_field_that_meta_has_not_is_refused_by_name(meta: tuple[Path, Path]) -> None:
    _, directory = meta
    params = json.loads((directory / "params.json").read_text())
    (directory / "params.json").write_text(json.dumps(params | {"moe": {"num_experts": 8}}))
    refused(lambda: open_checkpoint(directory), "params.json", "moe=")


def test_ranks_must_be_there_and_fit(meta: tuple[Path, Path]) -> None:
    _, directory = meta
    first = directory / "consolidated.00.pth"
    whole = torch.load(first)
    torch.save(whole, directory / "consolidated.02.pth")
    refused(lambda: open_checkpoint(directory), "consolidated.01.pth is missing")
    (directory / "consolidated.02.pth").unlink()
    part = {name: tensor for name, tensor in whole.items() if name != "norm.weight"}
    torch.save(part, directory / "consolidated.01.pth")
    refused(lambda: open_checkpoint(directory), "consolidated.01.pth does not match the first in norm.weight")
    torch.save(whole | {"output.weight": torch.ones(3, 5)}, directory / "consolidated.01.pth")
    refused(lambda: open_checkpoint(directory), "the parts of output.weight do not fit together")
    torch.save(whole, directory / "consolidated.01.pth")
    refused(lambda: open_checkpoint(directory), "misshapen", "layers.0.attention.wo.weight is [32, 64]")


def test_weights_without_a_config_ask_for_it(meta: tuple[Path, Path]) -> None:
    _, directory = meta
    (directory / "params.json").unlink()
    refused(lambda: open_checkpoint(directory), "config.json or params.json beside")


def test_a_single_file_may_be_named(meta: tuple[Path, Path]) -> None:
    source, directory = meta
    shutil.copyfile(directory / "consolidated.00.pth", directory / "model.pth")
    theirs = open_checkpoint(source).weights["output.weight"][:]
    for name in ("model.pth", "consolidated.00.pth"):
        assert torch.equal(open_checkpoint(directory / name).weights["output.weight"][:], theirs)
    shutil.copyfile(directory / "model.pth", source / "model.pth")  # gpt-fast leaves it beside the original's files
    assert open_checkpoint(source / "model.pth").config == open_checkpoint(source).config


def test_safetensors_that_cannot_be_opened_hide_no_model_pth(meta: tuple[Path, Path]) -> None:
    source, directory = meta
    (directory / "consolidated.00.pth").rename(directory / "model.pth")
    (directory / "adapter.safetensors").write_bytes(b"not read")
    theirs = open_checkpoint(source).weights["output.weight"][:]
    assert torch.equal(open_checkpoint(directory).weights["output.weight"][:], theirs)
    (directory / "model.safetensors").write_bytes(b"without a config.json, what are these?")
    assert torch.equal(open_checkpoint(directory).weights["output.weight"][:], theirs)
    shutil.copyfile(source / "config.json", directory / "config.json")
    refused(lambda: open_checkpoint(directory), "model.safetensors: truncated or no safetensors file")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "key", [slice(None), slice(3, 11), slice(5, 5), (slice(2, 9), slice(1, 6)), (slice(None), slice(-3, None))]
)
def test_a_slice_of_merged_parts_is_the_slice_of_the_whole(axis: int, key: Any) -> None:
    whole = torch.randn(12, 7)
    merged = Merged(whole.tensor_split([2, 5], axis), axis)
    assert merged.shape == (12, 7) and torch.equal(merged[key], whole[key])


@pytest.mark.parametrize("name", NAMED)
def test_params_of_every_named_shape_say_that_shape(name: str) -> None:
    config = NAMED[name]
    said = from_meta(to_meta(config), max_context=config.max_context)
    wanted = {f: getattr(config, f) for f in ("dim", "n_kv_heads", "head_dim", "ffn_dim", "norm_eps", "rope_theta")}
    assert {f: getattr(said, f) for f in wanted} == wanted
    if config.rope_scaling is not None:
        assert said.rope_scaling == config.rope_scaling


@pytest.mark.parametrize(
    ("params", "context"),
    [
        ({"norm_eps": 1e-6}, 2048),
        ({"norm_eps": 1e-5}, 4096),
        ({"norm_eps": 1e-5, "rope_theta": 1e6}, 16384),
        ({"vocab_size": 128256, "rope_theta": 5e5}, 8192),
        ({"vocab_size": 128256, "rope_theta": 5e5, "use_scaled_rope": True}, 131072),
        ({"hidden_dim": 96, "sliding_window": 4096}, 32768),
        ({"norm_eps": 1e-5, "max_seq_len": 777}, 777),
    ],
)
def test_the_context_that_params_leave_out(params: dict[str, Any], context: int) -> None:
    config = from_meta({"dim": 64, "n_layers": 1, "n_heads": 4} | params, vocab_size=128)
    assert config.max_context == context
    assert config.window == params.get("sliding_window")


# --- convert --------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "head-dim": {"head_dim": 24, "intermediate_size": 55},
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bit_identical(save_tiny: Any, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    source = save_tiny(**KINDS[kind]).directory
    tensors = {name: tensor.to(dtype) for name, tensor in state_of(source).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert convert(source, tmp_path / "meta") == "meta"
    assert {path.name for path in (tmp_path / "meta").iterdir()} >= {"params.json", "consolidated.00.pth"}
    assert not list((tmp_path / "meta").glob("*.safetensors"))
    assert convert(tmp_path / "meta", tmp_path / "back") == "hf"
    for name in ("model.safetensors", "config.json", "tokenizer_config.json", "generation_config.json"):
        assert digest(tmp_path / "back" / name) == digest(source / name), name
    convert(tmp_path / "back", tmp_path / "again")
    for name in ("consolidated.00.pth", "params.json"):
        one, other = tmp_path / "meta" / name, tmp_path / "again" / name
        assert one.suffix == ".pth" or digest(one) == digest(other), name
    first, second = (torch.load(tmp_path / place / "consolidated.00.pth") for place in ("meta", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_directory_of_ours_converts_too(tiny: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.directory)
    save_checkpoint(tmp_path / "ours", checkpoint.config, checkpoint.weights)
    for to in ("hf", "meta"):
        convert(tmp_path / "ours", tmp_path / to, to)
        again = open_checkpoint(tmp_path / to)
        assert again.config.dim == 32 and all(
            torch.equal(again.weights[name][:], tensor[:]) for name, tensor in checkpoint.weights.items()
        )


def test_shards_are_written_and_read(tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert(tiny.directory, tmp_path / "sharded", "hf", shard_bytes=20_000)
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded").state_dict()
    assert theirs.keys() == tiny.state.keys() and all(torch.equal(theirs[name], tiny.state[name]) for name in theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "no field for attention_bias"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "no field for rope_scaling"),
    ],
)
def test_what_meta_cannot_say_is_not_written(
    save_tiny: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = save_tiny(**changes).directory
    refused(lambda: convert(source, tmp_path / "meta"), message)
    assert not (tmp_path / "meta").exists() and not list(tmp_path.glob(".meta*"))


def test_a_directory_in_use_is_left_alone(tiny: Any) -> None:
    refused(lambda: convert(tiny.directory, tiny.directory), "not empty")
    refused(lambda: convert(tiny.directory, tiny.directory / "x", "onnx"), "unknown layout 'onnx'")


def test_the_command_converts(tiny: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llama_fast.ladder.cli", "convert"]
    done = subprocess.run(
        [*command, str(tiny.directory), str(tmp_path / "out")], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout == f"{tmp_path / 'out'}: meta\n" and done.returncode == 0
    done = subprocess.run([*command, "random:llama-2-7b", str(tmp_path / "no")], capture_output=True, text=True)
    assert done.returncode == 2 and "has no files to convert" in done.stderr and "Traceback" not in done.stderr


OF_A_GGUF = LlamaConfig(32, 2, 4, 2, 8, 48, 103, 777, rope_theta=5e5, bos_id=1, eos_ids=(2, 7))


def write_gguf(path: Path, vocabulary: Mapping[str, Any]) -> Checkpoint:
    """A GGUF of OF_A_GGUF, by the gguf package, with another model's vocabulary if one is given; what it holds."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(OF_A_GGUF.dim)
    writer.add_block_count(OF_A_GGUF.n_layers)
    writer.add_head_count(OF_A_GGUF.n_heads)
    writer.add_head_count_kv(OF_A_GGUF.n_kv_heads)
    writer.add_feed_forward_length(OF_A_GGUF.ffn_dim)
    writer.add_context_length(OF_A_GGUF.max_context)
    writer.add_vocab_size(OF_A_GGUF.vocab_size)
    writer.add_layer_norm_rms_eps(2**-10)
    writer.add_rope_freq_base(OF_A_GGUF.rope_theta)
    ids = {f"tokenizer.ggml.{name}_token_id": token for name, token in (("bos", 1), ("eos", 2), ("eot", 7))}
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for name, value in {**vocabulary, **ids}.items():
        add[type(value)](name, value)
    weights = {name: tensor[:] for name, tensor in random_checkpoint(OF_A_GGUF).weights.items()}
    for name, tensor in weights.items():
        writer.add_tensor(gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Checkpoint(dataclasses.replace(OF_A_GGUF, norm_eps=2**-10), weights)


def put_another_model_beside(directory: Path) -> None:
    config = dataclasses.replace(OF_A_GGUF, rope_theta=10000.0)
    (directory / "config.json").write_text(json.dumps(to_hf(config)))
    (directory / "params.json").write_text(json.dumps(to_meta(config)))
    (directory / "generation_config.json").write_text('{"eos_token_id": 9}')
    RandomTokenizer(103, None, ()).save(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
        (directory / name).write_text("{}")


def test_of_a_gguf_nothing_but_itself_is_converted(
    default_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "cache"))
    assert default_model.path is not None
    told = read_header(default_model.path).metadata
    source = tmp_path / "in" / "tiny.gguf"
    source.parent.mkdir()
    held = write_gguf(source, {name: value for name, value in told.items() if name.startswith("tokenizer.")})
    put_another_model_beside(source.parent)
    theirs = load_tokenizer(source)
    for to in ("hf", "meta"):
        assert convert(source, tmp_path / to, to) == to
        again, ours = open_checkpoint(tmp_path / to), load_tokenizer(tmp_path / to)
        assert again.config == dataclasses.replace(held.config, eos_ids=(2, 7, 0, 4))  # and those that their text tells
        assert all(torch.equal(again.weights[name][:], tensor[:]) for name, tensor in held.weights.items())
        assert ours.encode("Hello, my name is") == theirs.encode("Hello, my name is") == [19556, 28, 957, 1462, 314]
        assert (ours.bos_id, ours.eos_ids, ours.chat_template) == (1, (2,), told["tokenizer.chat_template"])
        assert not (tmp_path / to / "generation_config.json").exists()


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_a_gguf_without_a_vocabulary_converts_without_a_tokenizer(tmp_path: Path, to: str) -> None:
    held = write_gguf(tmp_path / "bare.gguf", {})
    assert not resolve(str(tmp_path / "bare.gguf")).has_tokenizer
    convert(tmp_path, tmp_path / "out", to)  # the directory that holds it
    assert open_checkpoint(tmp_path / "out").config == held.config
    assert not has_tokenizer(tmp_path / "out")


def test_an_unreadable_vocabulary_of_a_gguf_is_not_left_out(tmp_path: Path) -> None:
    tokens = [*"abcdefgh"]
    write_gguf(tmp_path / "odd.gguf", {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens})
    with pytest.raises(TokenizerError, match=r"odd\.gguf: its tokenizer could not be converted"):
        convert(tmp_path / "odd.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_the_tokenizer_of_random_weights_is_kept(tmp_path: Path, to: str) -> None:
    config = dataclasses.replace(OF_A_GGUF, bos_id=5)
    weights, tokenizer = random_checkpoint(config).weights, RandomTokenizer(103, 5, (2, 7))
    save_checkpoint(tmp_path / "ours", config, weights, tokenizer=tokenizer)
    (tmp_path / "ours" / "generation_config.json").write_text('{"eos_token_id": 9}')  # not read there
    convert(tmp_path / "ours", tmp_path / to, to)
    assert open_checkpoint(tmp_path / to).config == config
    assert load_tokenizer(tmp_path / to).encode("Hé") == tokenizer.encode("Hé")


def test_a_file_of_weights_takes_along_what_stands_beside_it(save_tiny: Any, tmp_path: Path) -> None:
    source = save_tiny().directory
    RandomTokenizer(101, None, ()).save(source)
    convert(source, tmp_path / "meta", "meta")
    assert convert(tmp_path / "meta" / "consolidated.00.pth", tmp_path / "back") == "hf"
    assert digest(tmp_path / "back" / "config.json") == digest(source / "config.json")
    assert load_tokenizer(tmp_path / "back").vocab_size == 101


def test_a_config_that_would_read_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_ref.convert

    write_gguf(tmp_path / "tiny.gguf", {})
    monkeypatch.setattr(llama_ref.convert, "to_hf", lambda config: to_hf(dataclasses.replace(config, rope_theta=7.0)))
    for to in ("hf", "meta"):
        refused(lambda: convert(tmp_path, tmp_path / "out", to), "rope_theta=7.0, not 500000.0")  # noqa: B023
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_llama_3_scaling_goes_into_params() -> None:
    config = LlamaConfig(64, 2, 4, 2, 16, 96, 128, 512, rope_scaling=RopeScaling("llama3", 32.0))
    params = to_meta(config)
    assert (params["use_scaled_rope"], params["rope_scaling_factor"]) == (True, 32.0)
    assert random_checkpoint(from_meta(params)).config.rope_scaling == config.rope_scaling


# --- the hub --------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: a private repository of one directory's files, for one token."""

    def __init__(self, files: dict[str, bytes], seen: list[str], *arguments: Any):
        self.files, self.seen = files, seen
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        self.seen.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_secret":
            self.send_response(401)
            self.send_header("X-Error-Code", "GatedRepo")
            self.end_headers()
            return
        if self.path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": []}).encode()
            if "/tree/" in self.path:
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.files.items()
                ]
                content = json.dumps(entries).encode()
            name = "info.json"
        else:
            name = self.path.rpartition("/")[2]
            content = self.files.get(name, b"")
            if name not in self.files:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
                return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(pickled: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that holds org/tiny with pickled weights only, and the paths asked of it."""
    files = {path.name: path.read_bytes() for path in pickled.iterdir()} | {"README.md": b"#", "flax.msgpack": b"x"}
    seen: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, files, seen))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", seen
    server.shutdown()
    server.server_close()
    thread.join()


def open_in_process(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The hub's client reads its environment when it is imported: a process of its own for each."""
    code = (
        "import sys; from llama_ref.models import open_model, ModelError\n"
        f"try: c = open_model({name!r}); print(c.config.dim, c.path)\n"
        "except ModelError as e: sys.exit(str(e))"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    # a proxy of the machine's is not to be asked for a server on the machine itself
    kept |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept | environment, cwd=REPOSITORY
    )


def test_the_hubs_environment_rules(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, seen = hub
    home = str(tmp_path / "home")
    done = open_in_process("org/tiny", HF_ENDPOINT=address, HF_HOME=home, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "'org/tiny' is no local path" in done.stderr and not seen
    done = open_in_process("org/tiny", HF_ENDPOINT=address, HF_HOME=home)
    assert done.returncode == 1 and "did not give it" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = open_in_process("org/tiny", HF_ENDPOINT=address, HF_HOME=home, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["32", f"{home}/hub/models--org--tiny/snapshots/{COMMIT}"]
    assert any(path.endswith("pytorch_model.bin") for path in seen)
    assert not any("msgpack" in path or "README" in path for path in seen)
    before = len(seen)
    done = open_in_process("org/tiny", HF_HOME=home, HF_HUB_OFFLINE="1", HF_ENDPOINT=address)
    assert done.returncode == 0 and len(seen) == before, done.stderr

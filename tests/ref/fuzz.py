"""Mutated checkpoints and tokenizers: loading one gives our own error or succeeds, and nothing else.

    python -m tests.ref.fuzz --files 20000

Every file is made from a valid one by a seed of its own, so `--first N --files 1` repeats case N. Cases run in a child
process, so that a crash or a hang of native code is a finding and not the end; findings are a wrong exception, a crash,
more than SECONDS, or memory beyond MEMORY_BYTES and GROWTH times the file. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama_ref.checkpoint import CheckpointError, open_checkpoint, random_checkpoint, save_checkpoint, with_adapter
from llama_ref.config import LlamaConfig, RopeScaling
from llama_ref.convert import convert
from llama_ref.tokenizers.chat import chat_text
from llama_ref.tokenizers.tokenizer import load_tokenizer
from llama_ref.tokenizers.tokenizer_files import TokenizerError

SECONDS = 20.0
MEMORY_BYTES = 200_000_000
GROWTH = 20
CONFIG = LlamaConfig(16, 2, 2, 1, 8, 24, 40, 64, rope_scaling=RopeScaling("llama3", 8.0), bos_id=1, eos_ids=(2,))
TEXTS = ("Hello, my name is", "</s> naïve 日本 🙂 \n\t42", "")


# --- valid files ----------------------------------------------------------------------------------


def write_seeds(root: Path) -> None:
    """One small directory per format, and which of its files are to be mutated."""
    save_checkpoint(root / "saved", CONFIG, random_checkpoint(CONFIG).weights)
    convert(root / "saved", root / "hf", "hf", shard_bytes=1 << 30)
    convert(root / "saved", root / "sharded", "hf", shard_bytes=4_000)
    convert(root / "saved", root / "meta", "meta")
    (root / "meta" / "config.json").unlink()  # which would be read in place of params.json
    shutil.copytree(root / "hf", root / "pickled")
    state = {name: tensor.clone() for name, tensor in _state(root / "hf").items()}
    (root / "pickled" / "model.safetensors").unlink()
    torch.save(state, root / "pickled" / "pytorch_model.bin")
    shutil.copytree(root / "pickled", root / "legacy")
    torch.save(state, root / "legacy" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    _write_fields(root)
    _write_pickled_shards(root, state)
    _write_tied(root, state)
    _write_adapters(root)
    _write_gguf(root / "gguf")
    _write_gguf_blocks(root / "blocks")
    _write_gguf_vocabularies(root)
    _write_tokenizers(root)
    _write_quantised(root)


def _write_fields(root: Path) -> None:
    """Every field of config.json that is read, and an index that an earlier save left behind."""
    shutil.copytree(root / "hf", root / "fields")
    (root / "fields" / "model.safetensors.index.json").write_text("{}")
    config = json.loads((root / "fields" / "config.json").read_text())
    rope = {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "rope_theta": 500.0, "beta_fast": 8, "beta_slow": 1.0}
    rope |= {"attention_factor": None, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}
    rope |= {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}
    beside = {"rope_theta": 300.0, "original_max_position_embeddings": 32, "partial_rotary_factor": None}
    others = {"use_sliding_window": False, "sliding_window": 8, "layer_types": ["full_attention"] * 2}
    config |= {"rope_interleaved": False, "rope_parameters": {"rope_type": "default"}, **beside, **others}
    (root / "fields" / "config.json").write_text(json.dumps({"rope_scaling": rope} | config | {"rope_scaling": rope}))
    (root / "fields" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))


def _write_adapters(root: Path) -> None:
    """Two adapters inside a model's directory: every field that is read; and one in a pickle, with tables and whole modules."""
    from safetensors.torch import load_file

    from tests.ref.lora_files import EVERY_LINEAR, write_adapter

    fields: dict[str, Any] = {"layers_to_transform": [0, 1], "layers_pattern": ["layers"], "use_rslora": True}
    fields |= {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"^model.layers.0": 5}, "exclude_modules": ["lm_head"]}
    fields |= {"bias": "none", "lora_bias": False, "modules_to_save": [], "init_lora_weights": True}
    fields |= {"ensure_weight_tying": False, "fan_in_fan_out": False, "use_dora": True, "target_parameters": None}
    tables = ("embed_tokens", "lm_head", "q_proj")
    for name, modules, more in (("lora", EVERY_LINEAR, fields), ("lora-bin", tables, {"modules_to_save": ["mlp"]})):
        shutil.copytree(root / "hf", root / name)
        write_adapter(root / name / "adapter", CONFIG, modules, **more)
    file = root / "lora-bin" / "adapter" / "adapter_model.safetensors"
    whole = {key: tensor for key, tensor in _state(root / "hf").items() if ".mlp." in key}
    tensors = load_file(file) | {f"base_model.model.{key}": tensor for key, tensor in whole.items()}
    torch.save({key: tensor.clone() for key, tensor in tensors.items()}, file.with_name("adapter_model.bin"))
    file.unlink()


def _write_pickled_shards(root: Path, state: dict[str, torch.Tensor]) -> None:
    """Two shards and their index, one tensor in both."""
    (root / "pickled-shards").mkdir()
    shutil.copyfile(root / "hf" / "config.json", root / "pickled-shards" / "config.json")
    names = sorted(state)
    places = {}
    for number, part in enumerate((names[:9], names[8:]), 1):
        torch.save({name: state[name] for name in part}, root / "pickled-shards" / f"pytorch_model-{number}.bin")
        places |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
    (root / "pickled-shards" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def _write_tied(root: Path, state: dict[str, torch.Tensor]) -> None:
    """A base model's names, and both of two tied tables."""
    from safetensors.torch import save_file

    (root / "tied").mkdir()
    config = json.loads((root / "hf" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (root / "tied" / "config.json").write_text(json.dumps(config))
    base = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file(base | {"lm_head.weight": base["embed_tokens.weight"].clone()}, root / "tied" / "model.safetensors")


def _state(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def _write_gguf(directory: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    from llama_ref.formats.gguf_file import gguf_name

    directory.mkdir()
    writer = GGUFWriter(directory / "model.gguf", "llama")
    config = LlamaConfig(32, 1, 2, 1, 16, 32, 40, 64)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_context_length(config.max_context)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    for name, tensor in random_checkpoint(config).weights.items():
        data = tensor[:].numpy()
        if data.ndim == 2 and "feed" in name:
            from gguf.quants import quantize

            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_gguf_blocks(directory: Path) -> None:
    """A matrix of each type whose blocks are kept, and one of a type that is only decoded."""
    import numpy
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    from llama_ref.formats.gguf_blocks import BLOCKS
    from tests.ref.gguf_files import tensors_of, write_gguf

    directory.mkdir()
    kinds = itertools.cycle([*(kind.upper() for kind in BLOCKS), "IQ2_XXS"])
    tensors: dict[str, Any] = {}
    for name, array in tensors_of(8).items():
        shape = [256 if extent in (32, 64) else extent for extent in array.shape]
        for layer in range(2 if name.startswith("blk") else 1):
            stored: Any = numpy.ones(shape, dtype=numpy.float32)
            if len(shape) == 2:
                kind = GGMLQuantizationType[next(kinds)]
                columns, size = GGML_QUANT_SIZES[kind]
                stored = numpy.zeros((shape[0], shape[1] // columns * size), dtype=numpy.uint8), kind
            tensors[name.replace("blk.0", f"blk.{layer}")] = stored
    shape_of = {"llama.embedding_length": 256, "llama.feed_forward_length": 256, "llama.block_count": 2}
    write_gguf(directory / "model.gguf", shape_of, tensors)


def _write_quantised(root: Path) -> None:
    """One directory of each tool, with every field of its config that is read."""
    from tests.ref.quantised_files import KINDS, fp8, write, write_matrices

    config = LlamaConfig(64, 1, 2, 1, 32, 64, 40, 64)
    for kind in QUANTISED:
        if kind == "fp8":
            settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 32]}
            write_matrices(root / kind, settings | {"fmt": "e4m3"}, fp8("blocks", "weight_scale_inv"), config)
            continue
        write(root / kind, kind, config)
        content = json.loads((root / kind / "config.json").read_text())
        content["quantization_config"] |= OF_QUANTISED.get(KINDS[kind].settings["quant_method"], {})
        (root / kind / "config.json").write_text(json.dumps({"quantization_config": None} | content))


def _write_gguf_vocabularies(root: Path) -> None:
    """One vocabulary of each kind, with every field that our reader looks at."""
    from sentencepiece import SentencePieceProcessor

    from tests.ref.gguf_files import byte_pair, pieces, sentencepiece_bytes, with_tokens, write_gguf

    more = {"<c>": 3, "<u>": 4, "<n>": 5, "<|im_end|>": 1}
    ids = {"bos": 1, "eos": 2, "eot": 2, "unknown": 0}
    common: dict[str, Any] = {f"tokenizer.ggml.{role}_token_id": token for role, token in ids.items()}
    common |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ messages[0]['content'] }}"}
    model: Any = SentencePieceProcessor(model_proto=sentencepiece_bytes())
    spaces = {f"tokenizer.ggml.{name}": True for name in ("add_space_prefix", "remove_extra_whitespaces")}
    for name, vocabulary in (("words", byte_pair()), ("pieces", {**pieces(model), **spaces})):
        (root / name).mkdir()
        write_gguf(root / name / "model.gguf", with_tokens(vocabulary, more) | common, tensors={})


def _write_tokenizers(root: Path) -> None:
    import base64

    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    corpus = ["Hello, my name is Lama.", "the cat sat on the mat, 42 times", "naïve café: é ü ß"] * 20
    template = "{% for m in messages %}{{ bos_token }}[{{ m['role'] }}] {{ m['content'] | trim }}{% endfor %}"
    for name in ("json", "sentencepiece", "tiktoken"):
        (root / name).mkdir()
        settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
        if name == "sentencepiece":
            settings["added_tokens_decoder"] = {"330": {"content": "<|x|>", "special": True, "lstrip": True}}
        (root / name / "tokenizer_config.json").write_text(json.dumps(settings))
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trainer: Any = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], vocab_size=300, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    backend.save(str(root / "json" / "tokenizer.json"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(root / "sentencepiece" / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" c", b" ca"]
    _write_companions(root, {"json": backend.get_vocab_size(), "sentencepiece": 330})
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (root / "tiktoken" / "tokenizer.model").write_text("\n".join(lines) + "\n")


def _write_companions(root: Path, sizes: dict[str, int]) -> None:
    """Every file that may stand beside a vocabulary; a class that cuts words in its own way; tokens listed by id."""
    named = {"additional_special_tokens": ["<|x|>"], "image_token": "<|i|>", "add_bos_token": True}
    mapped = {"eos_token": {"content": "</s>", "lstrip": True}, "pad_token": "<pad>"}
    for name, size in sizes.items():
        directory = root / f"{name}-companions"
        shutil.copytree(root / name, directory)
        (directory / "tokenizer_config.json").write_text(json.dumps(named))
        (directory / "special_tokens_map.json").write_text(json.dumps(mapped))
        (directory / "added_tokens.json").write_text(json.dumps({"<|x|>": size, "<pad>": size + 1}))
    (root / "class").mkdir()
    vocabulary = {text: index for index, text in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "▁a", "l", "m"])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["▁", "a"]], "unk_token": "<unk>", "fuse_unk": True}
    added = [{"id": 1, "content": "<s>", "special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip"), False)}]
    added[0]["normalized"] = False
    content = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": None, "model": model}
    (root / "class" / "tokenizer.json").write_text(json.dumps(content))
    listed = {"8": {"content": "<|x|>", "special": True, "rstrip": True}, "1": {"content": "<s>", "special": True}}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": True, "eos_token": "</s>"}
    settings |= {"added_tokens_decoder": listed, "split_special_tokens": False, "model_max_length": 10**30}
    settings |= {"chat_template": [{"name": "default", "template": "{{ messages[0]['content'] }}"}]}
    (root / "class" / "tokenizer_config.json").write_text(json.dumps(settings))


TARGETS: dict[str, tuple[str, ...]] = {
    "hf": ("model.safetensors", "config.json"),
    "sharded": ("model.safetensors.index.json", "model-00001-of-*.safetensors"),
    "fields": ("config.json", "config.json", "generation_config.json"),
    "tied": ("model.safetensors", "config.json"),
    "pickled-shards": ("pytorch_model.bin.index.json", "pytorch_model-1.bin"),
    "lora": ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    "lora-bin": ("adapter/adapter_config.json", "adapter/adapter_model.bin"),
    "saved": ("model.safetensors", "config.json"),
    "pickled": ("pytorch_model.bin",),
    "legacy": ("pytorch_model.bin",),
    "meta": ("params.json", "consolidated.00.pth"),
    "gguf": ("model.gguf",),
    "blocks": ("model.gguf",),
    "words": ("model.gguf",),
    "pieces": ("model.gguf",),
    "json": ("tokenizer.json", "tokenizer_config.json"),
    "sentencepiece": ("tokenizer.model", "tokenizer_config.json"),
    "tiktoken": ("tokenizer.model",),
    "json-companions": ("special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"),
    "sentencepiece-companions": ("special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"),
    "class": ("tokenizer_config.json", "tokenizer.json"),
    "gptq": ("config.json", "model.safetensors"),
    "gptq-order": ("model.safetensors", "config.json"),
    "awq": ("config.json", "model.safetensors"),
    "ct-4-zero": ("config.json", "model.safetensors"),
    "ct-int8-zero": ("config.json", "model.safetensors"),
    "fp8": ("config.json", "model.safetensors"),
    "torchao-intx": ("config.json", "model.safetensors"),
}
QUANTISED = ("gptq", "gptq-order", "awq", "ct-4-zero", "ct-int8-zero", "fp8", "torchao-intx")
OF_QUANTISED: dict[str, dict[str, Any]] = {
    "gptq": {"checkpoint_format": "gptq", "pack_dtype": "int32", "is_marlin_format": False},
    "awq": {"backend": "auto", "w_bit": 4},
    "compressed-tensors": {"ignore": ["lm_head", "re:.*embed"], "kv_cache_scheme": None, "sparsity_config": {}},
}
TOKENIZERS = (
    *("json", "sentencepiece", "tiktoken", "words", "pieces"),
    *("json-companions", "sentencepiece-companions", "class"),
)


# --- mutations ------------------------------------------------------------------------------------

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, -(2**63), 0.5, float("nan"), float("inf"), 1e308),
    *("", "x", "\x00", "../..", "F32", "yarn", "é" * 50, [], {}, [[]], [0, 10**18], [-1, 5], {"a": {}}, [None]),
)
ODD_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1)


def mutated(name: str, data: bytes, draw: random.Random) -> bytes:
    """A damaged copy: JSON by its values (or as bytes), the headers of safetensors and GGUF too, all else as bytes."""
    kind = draw.random()
    if name.endswith(".json") and kind < 0.7:
        return _odd_json(data, draw)
    if name.endswith(".safetensors") and kind < 0.3:
        return _odd_tensors(data, draw)
    if name.endswith(".safetensors") and kind < 0.6:
        length = int.from_bytes(data[:8], "little")
        header = _odd_json(data[8 : 8 + length], draw)
        if draw.random() < 0.5:
            header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    if name.endswith(".gguf") and kind < 0.7:
        return _odd_gguf(data, draw)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        data = draw.choice(BYTE_MUTATIONS)(data, draw)
    return data


def _odd_json(data: bytes, draw: random.Random) -> bytes:
    content = json.loads(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        stack = [content]
        while stack:
            value = stack.pop()
            entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            for key, inner in entries:
                places.append((value, key))
                stack.append(inner)
        if not places:
            return json.dumps(copy.deepcopy(draw.choice(ODD_VALUES))).encode()
        # deep lists (a vocabulary) would else be all that is ever hit
        holder, key = draw.choice(places[: draw.choice((8, 40, len(places)))])
        if draw.random() < 0.15:
            del holder[key]
        elif draw.random() < 0.15 and isinstance(holder, dict):
            holder[draw.choice(("x", "", "type", f"{key}2"))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(draw.choice(ODD_VALUES))  # a later change must not reach the next case
    return json.dumps(content).encode()


def _odd_tensors(data: bytes, draw: random.Random) -> bytes:
    """A file in order whose tensors are not: of another type or shape, with other numbers, without a name or under another."""
    from safetensors.torch import load, save

    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = load(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        name = draw.choice([*tensors])
        tensor = tensors.pop(name)
        change = draw.randrange(8)
        if change == 0:
            continue
        if change == 1:
            stem, _, part = draw.choice([*tensors]).rpartition(".")
            name = draw.choice((f"{stem}.{name.rpartition('.')[2]}", f"{name.rpartition('.')[0]}.{part}", f"{name}2"))
        elif change == 2:
            tensor = tensor.to(
                draw.choice((torch.int8, torch.uint8, torch.int32, torch.int64, torch.half, torch.float))
            )
        elif change == 3:
            tensor = tensor.t() if tensor.dim() == 2 else tensor[None]
        elif change == 4:
            tensor = tensor.flatten()[: draw.choice((0, 1, 7))] if draw.random() < 0.5 else tensor[:-1]
        elif change == 5 and tensor.numel() and not tensor.dtype.is_floating_point:
            tensor = tensor.clone()
            tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice((-1, 0, 1, 7, 127, -128))
        elif change == 6:
            tensor = torch.cat([tensor, tensor]) if tensor.dim() else tensor.reshape(1, 1)
        tensors[name] = tensor.contiguous()
    return save({name: tensor.clone() for name, tensor in tensors.items()}, header.get("__metadata__"))


ROPE = [f"llama.rope.scaling.{name}" for name in ("type", "factor", "attn_factor", "yarn_beta_fast", "alpha")]
ODD_NAMES = (
    *("llama.vocab_size", "split.count", "split.no", "general.alignment", "general.type", *ROPE),
    *(f"tokenizer.ggml.{name}" for name in ("add_eos_token", "precompiled_charsmap", "scores", "fim_pad_token_id")),
)


def _odd_gguf(data: bytes, draw: random.Random) -> bytes:
    """Other values in the metadata, or in one of its arrays; what stands behind it stays in order."""
    from llama_ref.formats.gguf_header import _Cursor

    cursor: Any = _Cursor(data, 8)  # type: ignore[arg-type]
    n_tensors, n_entries = cursor.number("Q"), cursor.number("Q")
    content = {}
    for _ in range(n_entries):
        name = cursor.text()
        content[name] = cursor.value(cursor.number("I"))
    start = cursor.position
    for _ in range(n_tensors):
        cursor.text()
        for _ in range(cursor.number("I")):
            cursor.number("Q")
        cursor.position += 12
    end = cursor.position
    for _ in range(draw.choice((1, 1, 2, 3))):
        name = draw.choice([*content, *ODD_NAMES])
        value = content.get(name)
        if isinstance(value, list) and value and draw.random() < 0.6:
            value[draw.randrange(len(value))] = draw.choice((value[0], value[-1], -1, 0, 3, 7, 2**31 - 1, "", "é", 0.5))
            if draw.random() < 0.2:
                del value[draw.randrange(len(value)) :]
        elif name in content and draw.random() < 0.2:
            del content[name]
        else:
            content[name] = copy.deepcopy(draw.choice((*ODD_VALUES, "llama", "gpt2", "default", "yarn", "linear", 4.0)))
    head = data[:16] + struct.pack("<Q", len(content))
    header = head + b"".join(_gguf_text(name) + _gguf_value(value) for name, value in content.items()) + data[start:end]
    return header + bytes(-len(header) % 32) + data[end + -end % 32 :]


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _gguf_value(value: Any) -> bytes:
    """A type's number and the value; what GGUF cannot say becomes a text."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return struct.pack("<Iq", 11, value) if value < 0 else struct.pack("<IQ", 10, value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, list):
        kinds = {type(entry) for entry in value}
        if kinds <= {int} and all(-(2**31) <= entry < 2**31 for entry in value):
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
        if kinds <= {int, float}:
            return struct.pack(f"<IIQ{len(value)}d", 9, 12, len(value), *map(float, value))
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(_gguf_text(str(entry)) for entry in value)
    return struct.pack("<I", 8) + _gguf_text(str(value))


def _flip(data: bytes, draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: _place(data, draw)]


def _remove(data: bytes, draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + data[at + draw.choice((1, 4, 8, 64)) :]


def _insert(data: bytes, draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + bytes(draw.randrange(256) for _ in range(draw.choice((1, 4, 8, 64)))) + data[at:]


def _number(data: bytes, draw: random.Random) -> bytes:
    at, size = _place(data, draw), draw.choice((1, 2, 4, 8))
    return data[:at] + (draw.choice(ODD_NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]


def _repeat(data: bytes, draw: random.Random) -> bytes:
    at, to = _place(data, draw), _place(data, draw)
    return data[:to] + data[at : at + draw.choice((4, 32, 256))] + data[to:]


def _place(data: bytes, draw: random.Random) -> int:
    """More often near the start, where headers are, or near the end, where a zip has its directory."""
    size = len(data)
    reach = min(size, draw.choice((16, 64, 512, 4096, size)) if size else 0)
    at = draw.randrange(reach) if reach else 0
    return max(0, size - 1 - at) if draw.random() < 0.25 else at


BYTE_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _flip, _flip, _number, _number, _number),  # these leave everything else in its place
    *(_cut, _remove, _insert, _repeat),
)


# --- one case -------------------------------------------------------------------------------------


def run_case(number: int, seeds: Path, work: Path) -> tuple[str, str]:
    """("hf/config.json", "accepted" | "refused" | what went wrong); work holds the damaged directory afterwards."""
    draw = random.Random(number)
    kind = list(TARGETS)[number % len(TARGETS)]
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(seeds / kind, work)
    pattern = draw.choice(TARGETS[kind])
    target = sorted(work.glob(pattern))[0]
    target.write_bytes(mutated(target.name, target.read_bytes(), draw))
    limit = MEMORY_BYTES + GROWTH * sum(file.stat().st_size for file in work.rglob("*"))
    with contextlib.suppress(OSError):  # where the kernel can: the peak begins anew, whatever ran before
        Path("/proc/self/clear_refs").write_text("5")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            _load(work, kind)
        long = [str(warning.message) for warning in told if "\n" in str(warning.message)]
        outcome = f"a warning of several lines: {long[0]!r}" if long else "accepted"
    except (CheckpointError, TokenizerError) as error:
        outcome = "refused" if "\n" not in str(error) else f"an error of several lines: {error!r}"
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if time.monotonic() - began > SECONDS:
        outcome = f"took {time.monotonic() - began:.0f} s"
    elif grown > limit:
        outcome = f"grew by {grown / 1e6:.0f} MB"
    return f"{kind}/{pattern}", outcome


def _load(work: Path, kind: str) -> None:
    """What a user's program does with a model directory, up to its first token."""
    if kind in TOKENIZERS:
        tokenizer = load_tokenizer(work)
        for text in TEXTS:
            tokenizer.decode(tokenizer.encode(text))
        tokenizer.decode([0, 5, 10**6])
        chat_text(tokenizer, [{"role": "user", "content": "Hi"}])
        return
    checkpoint = open_checkpoint(work)
    if (work / "adapter").is_dir():
        checkpoint = with_adapter(checkpoint, work / "adapter")
    kept = {} if checkpoint.stored is None else checkpoint.stored.weights
    for tensor in (*checkpoint.weights.values(), *kept.values()):
        whole = tensor[:]
        assert tuple(whole.shape) == tuple(tensor.shape)
        tensor[:1]


# --- many cases -----------------------------------------------------------------------------------


def work_through(first: int, last: int, seeds: Path, report: Path) -> None:
    """Cases first..last - 1 in this process; a line of the report before each, and one after it."""
    work = report.with_suffix(".work")
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))  # so that a wild length fails here, not on the machine
    warm_up(seeds)
    with report.open("a") as file:
        for number in range(first, last):
            print(json.dumps(["begin", number]), file=file, flush=True)
            print(json.dumps(["end", number, *run_case(number, seeds, work)]), file=file, flush=True)
    shutil.rmtree(work, ignore_errors=True)


def warm_up(seeds: Path) -> None:
    """Load every valid one, so that what a library imports is not counted as a case's memory."""
    for kind in TARGETS:
        _load(seeds / kind, kind)


def fuzz(first: int, count: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """(how many of each outcome per target, findings). A child that dies or hangs is started again behind its case."""
    seeds, report = folder / "seeds", folder / "report.jsonl"
    seeds.mkdir()
    write_seeds(seeds)
    counts: Counter[str] = Counter()
    findings: list[str] = []
    number, last = first, first + count
    while number < last:
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.ref.fuzz", "--worker", str(number), str(last), str(seeds), str(report)]
        environment = os.environ | {"LLAMA_FAST_CACHE": str(folder / "cache"), "RUST_BACKTRACE": "0"}
        errors = folder / "stderr"
        with errors.open("w") as sink:
            child = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
            stuck = _watch(child, report)
        seen = [json.loads(line) for line in report.read_text().splitlines()] if report.is_file() else []
        for entry in seen:
            if entry[0] == "end":
                _, number, target, outcome = entry
                wrong = outcome not in ("accepted", "refused")
                counts[f"{target}: {'FOUND' if wrong else outcome}"] += 1
                findings += [f"case {number}, {target}: {outcome}"] if wrong else []
        begun = [entry[1] for entry in seen if entry[0] == "begin"]
        if not begun:
            raise RuntimeError(f"the fuzzing process did not start: {errors.read_text()[-2000:]}")
        if child.returncode != 0:
            kind = list(TARGETS)[begun[-1] % len(TARGETS)]
            findings.append(f"case {begun[-1]}, {kind}: {'hangs' if stuck else f'dies with {child.returncode}'}")
            counts[f"{kind}: FOUND"] += 1
        number = begun[-1] + 1
    return counts, findings


def _watch(child: subprocess.Popen[bytes], report: Path) -> bool:
    """Wait for a child's end; kill it, and say so, if its report stands still."""
    size, since = -1, time.monotonic()
    while child.poll() is None:
        time.sleep(0.2)
        now = report.stat().st_size if report.is_file() else 0
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > (3 * SECONDS if size > 0 else 300):  # its imports come first
            child.kill()
            child.wait()
            return True
    return False


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        work_through(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts, findings = fuzz(arguments.first, arguments.files, Path(folder))
    for line, count in sorted(counts.items()):
        print(f"{count:6d}  {line}")
    print(f"{sum(counts.values())} files in {time.monotonic() - began:.0f} s, {len(findings)} findings")
    print("\n".join(findings[:50]))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

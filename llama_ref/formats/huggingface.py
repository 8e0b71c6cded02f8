"""Hugging Face directories: config.json, and tensors named `model.layers.N.self_attn.q_proj.weight` and the like, in
safetensors or pickled files.

Besides the names, one arrangement differs from Meta's: the rows of q and k stand with all first halves of the rotary
pairs before all second halves. They are put back head by head as slices are read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_ref.config import LlamaConfig
from llama_ref.formats import foreign
from llama_ref.formats.fields import as_ids, whole
from llama_ref.formats.hf_config import from_hf, ids_within
from llama_ref.formats.safetensors_files import read_json
from llama_ref.formats.tied_tables import settle_tables
from llama_ref.formats.weight_files import NAMED, header_texts, holds_weights, open_weights
from llama_ref.weights import (
    Checkpoint,
    CheckpointError,
    Key,
    TensorSource,
    check_floats,
    check_shapes,
    expected_shapes,
    spans,
)

OF_MODEL = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
OF_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
PREFIX = "model."
TABLES = ("model.embed_tokens", "lm_head")
HARMLESS = re.compile(  # follow from the config; old conversions stored them
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|self_attn\.(masked_)?bias|causal_mask)$"
)


@dataclass(frozen=True)
class InterleavedRows:
    """A q or k weight in Meta's row order over one in Hugging Face's: reads only the heads that a slice touches."""

    stored: TensorSource
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def __getitem__(self, key: Key, /) -> torch.Tensor:
        (start, stop), *columns = spans(key, self.shape)
        first, last = start // self.head_dim, -(-stop // self.head_dim)  # heads, the last one excluded
        whole_heads = (slice(first * self.head_dim, last * self.head_dim), *(slice(*part) for part in columns))
        heads = self.stored[whole_heads]
        offset = first * self.head_dim
        return interleave(heads, self.head_dim)[start - offset : stop - offset]


def interleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Whole heads from halves to pairs: rows [a0 a1 a2 b0 b1 b2] of one head -> [a0 b0 a1 b1 a2 b2]."""
    n_heads = rows.shape[0] // head_dim
    return rows.reshape(n_heads, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def halve(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Whole heads from pairs to halves, the inverse of `interleave`: rows [a0 b0 a1 b1] of one head -> [a0 a1 b0 b1]."""
    n_heads = rows.shape[0] // head_dim
    return rows.reshape(n_heads, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def is_rotary(name: str) -> bool:
    """Whether a canonical tensor's rows stand in rotary pairs: those of q and k, weights and biases, in all parts."""
    return (".attention.wq." in name or ".attention.wk." in name) and not name.endswith(".order")


def huggingface_name(name: str) -> str:
    """Canonical name -> Hugging Face's: "layers.3.attention.wq.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    if name in OF_MODEL:
        return OF_MODEL[name]
    stem, _, kind = name.rpartition(".")
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{OF_LAYER[part]}.{kind}"


def is_huggingface(directory: Path) -> bool:
    """Whether a directory has a config.json and weights, or an index of them, under the names that are read here."""
    config = directory / "config.json"
    return config.is_file() and (holds_weights(directory) or read_json(config).get(NAMED) is not None)


def open_huggingface(directory: Path) -> Checkpoint:
    """Open a directory that `save_pretrained`, the hub, or a tool that quantises wrote; raises CheckpointError."""
    data = read_json(directory / "config.json")
    settings = foreign.stated_in(data)
    config = _config(directory, data if settings is None else foreign.without(data))
    named = data.get(NAMED)
    stored = _under_full_names(open_weights(directory, named), config)
    encodings: dict[str, str] = {}
    if settings is not None:
        untied = dataclasses.replace(config, tie_embeddings=False)
        shapes = {huggingface_name(name): shape for name, shape in expected_shapes(untied).items()}
        texts = header_texts(directory, named) if settings["quant_method"] == "torchao" else {}
        stored, encodings = foreign.held(stored, settings, shapes, texts, directory)
    stored, config = settle_tables(stored, config, TABLES, directory)
    if config.tie_embeddings and TABLES[1] in encodings:
        encodings[TABLES[0]] = encodings.pop(TABLES[1])
    parts = {name for name in stored if name.rpartition(".")[0] in encodings and not name.endswith(".bias")}
    _check(stored, parts, config, directory)
    expected = expected_shapes(config)
    weights: dict[str, TensorSource] = {}
    stems = {huggingface_name(name).rpartition(".")[0]: name.rpartition(".")[0] for name in expected}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        ours = f"{stems[module]}.{part}"
        weights[ours] = InterleavedRows(tensor, config.head_dim) if is_rotary(ours) else tensor
    kinds = {stems[module]: kind for module, kind in encodings.items()}
    ordered = {name: weights[name] for name in _in_order(weights, expected)}
    return Checkpoint(config, ordered, directory, _principal(kinds, expected), kinds)


def _in_order(names: Iterable[str], expected: Iterable[str]) -> list[str]:
    """The names as a forward pass meets them, the parts of a matrix behind its weight."""
    place = {name: index for index, name in enumerate(expected)}
    return sorted(names, key=lambda name: place[name if name in place else f"{name.rpartition('.')[0]}.weight"])


def _check(stored: Mapping[str, TensorSource], parts: Collection[str], config: LlamaConfig, directory: Path) -> None:
    """CheckpointError unless the tensors are the model's: floats of its shapes, or `parts`, which their reader has compared."""
    wanted = {huggingface_name(name): shape for name, shape in expected_shapes(config).items()}
    if wanted.keys() ^ stored.keys() == {OF_MODEL["output.weight"]}:
        raise CheckpointError(
            f"{directory}: 1 missing: {OF_MODEL['output.weight']}; a model saved without its head can be read only if "
            "config.json says tie_word_embeddings"
        )
    wanted |= {name: tuple(stored[name].shape) for name in parts}
    check_shapes({name: tensor.shape for name, tensor in stored.items()}, wanted, directory)
    check_floats({name: tensor for name, tensor in stored.items() if name not in parts}, directory)


def _principal(kinds: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]) -> str:
    """The encoding of most of the weights that are encoded; "dense" where none is."""
    weights = dict.fromkeys(kinds.values(), 0)
    for stem, kind in kinds.items():
        rows, columns = expected[f"{stem}.weight"]
        weights[kind] += rows * columns
    return max(weights, key=lambda kind: weights[kind], default="dense")


def _under_full_names(stored: Mapping[str, TensorSource], config: LlamaConfig) -> dict[str, TensorSource]:
    """The tensors of the whole model: a base model saved alone has names without "model.", one inside another twice.

    Buffers that follow from the config are left out.
    """
    untied = dataclasses.replace(config, tie_embeddings=False)
    known = {huggingface_name(name).rpartition(".")[0] for name in expected_shapes(untied)}
    found: dict[str, TensorSource] = {}
    for name, tensor in stored.items():
        if HARMLESS.search(name):
            continue
        full = name
        if name.rpartition(".")[0] not in known:
            others = [f"{PREFIX}{name}", name.removeprefix(PREFIX)]
            full = next((other for other in others if _free(other, known, stored, found)), name)
        found[full] = tensor
    return found


def _free(name: str, known: set[str], *taken: Mapping[str, TensorSource]) -> bool:
    """Whether a name is of one of the modules `known`, and no tensor has it."""
    return name.rpartition(".")[0] in known and not any(name in others for others in taken)


def read_config(directory: Path) -> LlamaConfig:
    """config.json, with the EOS ids of generation_config.json; raises CheckpointError."""
    return _config(directory, read_json(directory / "config.json"))


def _config(directory: Path, data: Mapping[str, Any]) -> LlamaConfig:
    """The same of what config.json holds."""
    config, generation = directory / "config.json", directory / "generation_config.json"
    ends = _stated_ends(data, config)
    more = _stated_ends(read_json(generation), generation) if generation.is_file() else None
    try:
        if more is not None:  # it, not config.json, is where chat models name all their stop tokens
            ends = (ends or ()) + ids_within(more, "eos_token_id", whole(data, "vocab_size"), generation)
        if ends is not None:  # else the published default: it is not joined to what a file states
            data = {**data, "eos_token_id": list(ends)}
        return from_hf(data, config)
    except CheckpointError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{config}: {error}") from error


def _stated_ends(data: Mapping[str, Any], where: Path) -> tuple[int, ...] | None:
    """The EOS ids of a file: () where it says null, None where it says nothing."""
    try:
        return as_ids(data["eos_token_id"]) if "eos_token_id" in data else None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error

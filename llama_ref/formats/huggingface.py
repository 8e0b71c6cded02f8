"""Hugging Face directories: config.json, and tensors named `model.layers.N.self_attn.q_proj.weight` and the like, in
safetensors or pickled files.

Besides the names, one arrangement differs from Meta's: the rows of q and k stand with all first halves of the rotary
pairs before all second halves. They are put back head by head as slices are read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_ref.config import LlamaConfig
from llama_ref.formats.fields import as_ids, whole
from llama_ref.formats.hf_config import from_hf, ids_within
from llama_ref.formats.safetensors_files import read_json
from llama_ref.formats.tied_tables import settle_tables
from llama_ref.formats.weight_files import NAMED, holds_weights, open_weights
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
    """Whether a canonical tensor's rows stand in rotary pairs: those of q and k, weights and biases."""
    return ".attention.wq." in name or ".attention.wk." in name


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
    """Open a directory that `save_pretrained` or the hub wrote; raises CheckpointError."""
    config = read_config(directory)
    named = read_json(directory / "config.json").get(NAMED)
    stored = _under_full_names(open_weights(directory, named), config)
    stored, config = settle_tables(stored, config, TABLES, directory)
    expected = expected_shapes(config)
    wanted = {huggingface_name(name): shape for name, shape in expected.items()}
    if wanted.keys() ^ stored.keys() == {OF_MODEL["output.weight"]}:
        raise CheckpointError(
            f"{directory}: 1 missing: {OF_MODEL['output.weight']}; a model saved without its head can be read only if "
            "config.json says tie_word_embeddings"
        )
    check_shapes({name: tensor.shape for name, tensor in stored.items()}, wanted, directory)
    check_floats(stored, directory)
    weights: dict[str, TensorSource] = {}
    for name in expected:
        tensor = stored[huggingface_name(name)]
        weights[name] = InterleavedRows(tensor, config.head_dim) if is_rotary(name) else tensor
    return Checkpoint(config, weights, directory)


def _under_full_names(stored: Mapping[str, TensorSource], config: LlamaConfig) -> dict[str, TensorSource]:
    """The tensors of the whole model: a base model saved alone has names without "model.", one inside another twice.

    Buffers that follow from the config are left out.
    """
    untied = dataclasses.replace(config, tie_embeddings=False)
    known = {huggingface_name(name) for name in expected_shapes(untied)}
    found: dict[str, TensorSource] = {}
    for name, tensor in stored.items():
        if HARMLESS.search(name):
            continue
        full = name
        if name not in known:
            others = [f"{PREFIX}{name}", name.removeprefix(PREFIX)]
            full = next(
                (other for other in others if other in known and other not in stored and other not in found), name
            )
        found[full] = tensor
    return found


def read_config(directory: Path) -> LlamaConfig:
    """config.json, with the EOS ids of generation_config.json; raises CheckpointError."""
    config, generation = directory / "config.json", directory / "generation_config.json"
    data = read_json(config)
    ends = _stated_ends(data, config)
    more = _stated_ends(read_json(generation), generation) if generation.is_file() else None
    try:
        if more is not None:  # it, not config.json, is where chat models name all their stop tokens
            ends = (ends or ()) + ids_within(more, "eos_token_id", whole(data, "vocab_size"), generation)
        if ends is not None:  # else the published default: it is not joined to what a file states
            data["eos_token_id"] = list(ends)
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

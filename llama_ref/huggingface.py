"""Hugging Face directories: config.json, safetensors under `model.layers.N.self_attn.q_proj.weight` and the like.

Besides the names, one arrangement differs from Meta's: the rows of q and k stand with all first halves of the rotary
pairs before all second halves. They are put back head by head as slices are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_ref.config import LlamaConfig, as_ids
from llama_ref.safetensors_files import StoredTensor, open_directory, read_json
from llama_ref.weights import Checkpoint, CheckpointError, Key, TensorSource, check_shapes, expected_shapes, spans

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
HARMLESS = re.compile(r"rotary_emb\.inv_freq$")  # derived from the config; old conversions stored it
ROWS_COMPARED = 8192  # so that comparing two tables never holds more than a part of them


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
        (start, stop), (left, right) = spans(key, self.shape)
        first, last = start // self.head_dim, -(-stop // self.head_dim)  # heads, the last one excluded
        heads = self.stored[first * self.head_dim : last * self.head_dim, left:right]
        offset = first * self.head_dim
        return interleave(heads, self.head_dim)[start - offset : stop - offset]


def interleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Whole heads from halves to pairs: rows [a0 a1 a2 b0 b1 b2] of one head -> [a0 b0 a1 b1 a2 b2]."""
    n_heads = rows.shape[0] // head_dim
    return rows.reshape(n_heads, 2, head_dim // 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def huggingface_name(name: str) -> str:
    """Canonical name -> Hugging Face's: "layers.3.attention.wq.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    if name in OF_MODEL:
        return OF_MODEL[name]
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"model.layers.{layer}.{OF_LAYER[part]}.weight"


def open_huggingface(directory: Path) -> Checkpoint:
    """Open a directory that `save_pretrained` or the hub wrote; raises CheckpointError."""
    config = _read_config(directory)
    stored = {name: tensor for name, tensor in open_directory(directory).items() if not HARMLESS.search(name)}
    if config.tie_embeddings and "lm_head.weight" in stored:
        _check_duplicate(stored, directory)
        del stored["lm_head.weight"]
    expected = expected_shapes(config)
    wanted = {huggingface_name(name): shape for name, shape in expected.items()}
    check_shapes({name: tensor.shape for name, tensor in stored.items()}, wanted, directory)
    packed = [name for name, tensor in stored.items() if not tensor.dtype.is_floating_point]
    if packed:
        raise CheckpointError(f"{directory}: {packed[0]} is stored as {stored[packed[0]].dtype}, not as floats")
    weights: dict[str, TensorSource] = {}
    for name in expected:
        tensor = stored[huggingface_name(name)]
        rotary = name.endswith(("attention.wq.weight", "attention.wk.weight"))
        weights[name] = InterleavedRows(tensor, config.head_dim) if rotary else tensor
    return Checkpoint(config, weights, directory)


def _read_config(directory: Path) -> LlamaConfig:
    data = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    try:
        if generation.is_file():  # it, not config.json, is where chat models name all their stop tokens
            ends = as_ids(read_json(generation).get("eos_token_id"))
            data["eos_token_id"] = list(dict.fromkeys(as_ids(data.get("eos_token_id", 2)) + ends))
        return LlamaConfig.from_hf(data)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from error


def _check_duplicate(stored: Mapping[str, StoredTensor], directory: Path) -> None:
    """A tied model may store its table twice; if the two differ, the config or the file is wrong: who knows which?"""
    table, head = stored.get("model.embed_tokens.weight"), stored["lm_head.weight"]
    if table is None:
        return  # the strict check will name it
    same = table.shape == head.shape and all(
        torch.equal(table[row : row + ROWS_COMPARED], head[row : row + ROWS_COMPARED])
        for row in range(0, table.shape[0], ROWS_COMPARED)
    )
    if not same:
        raise CheckpointError(f"{directory}: tie_word_embeddings=True, but lm_head.weight is not the embedding table")

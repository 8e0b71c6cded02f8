"""GGUF files of the llama architecture: one file with everything in it, often quantised; read as floats, or kept as stored.

Unlike in Hugging Face's layout, the rows of q and k already stand in Meta's order. The file states two facts by its
tensors: no `output.weight` means tied embeddings, and `rope_freqs.weight` means llama-3 RoPE scaling.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llama_ref.config import LlamaConfig
from llama_ref.formats.gguf_blocks import BLOCKS, block_fields, mapped
from llama_ref.formats.gguf_config import from_gguf
from llama_ref.formats.gguf_header import PART, TensorPlace, first_part, read_header
from llama_ref.weights import Checkpoint, CheckpointError, Key, TensorSource, check_shapes, expected_shapes, spans

OF_MODEL = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
OF_LAYER = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
ROPE_FACTORS = "rope_freqs.weight"
PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}  # ggml type -> stored as it is
HALVES = ("f16", "bf16")  # floats as they are, but narrower than what a CPU computes in
INTEGERS = ("I8", "I16", "I32", "I64")
RECENT = {39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}  # types that an older gguf package cannot name


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor of a file; only the rows asked for are read and dequantised (to float32).

    A quantised row is a chain of blocks, so columns are cut after the rows have been dequantised.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    ggml_type: int
    path: Path
    offset_bytes: int
    row_bytes: int

    @property
    def kind(self) -> str:
        """Its GGML type's name in small letters: "q4_k"."""
        from gguf.constants import GGMLQuantizationType

        return str(GGMLQuantizationType(self.ggml_type).name).lower()

    def __getitem__(self, key: Key, /) -> torch.Tensor:
        import numpy

        parts = spans(key, self.shape)
        if any(start == stop for start, stop in parts):
            return torch.empty([stop - start for start, stop in parts], dtype=self.dtype)
        start, stop = parts[0] if len(self.shape) == 2 else (0, 1)
        place = self.path, self.offset_bytes + start * self.row_bytes, (stop - start, self.row_bytes)
        taken = numpy.array(mapped(*place))  # a copy: a tensor over the read-only mapping could be written to
        if self.ggml_type in PLAIN:
            values = torch.from_numpy(taken).view(self.dtype)
        else:
            from gguf.constants import GGMLQuantizationType
            from gguf.quants import dequantize

            values = torch.from_numpy(dequantize(taken, GGMLQuantizationType(self.ggml_type)))
        left, right = parts[-1]
        part = values[:, left:right] if len(self.shape) == 2 else values[0, left:right]
        return part.contiguous()


def gguf_name(name: str) -> str:
    """Canonical name -> GGUF's: "layers.3.feed_forward.w1.weight" -> "blk.3.ffn_gate.weight"."""
    if name in OF_MODEL:
        return OF_MODEL[name]
    stem, _, kind = name.rpartition(".")
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{OF_LAYER[part]}.{kind}"


def open_gguf(path: Path) -> Checkpoint:
    """Open one GGUF file, or a model in several parts by any of them; raises CheckpointError."""
    path = first_part(path)
    metadata, stored = _parts(path)
    factors = stored.pop(ROPE_FACTORS, None)
    alone = OF_MODEL["output.weight"] in stored and OF_MODEL["tok_embeddings.weight"] not in stored
    if alone:
        stored[OF_MODEL["tok_embeddings.weight"]] = stored.pop(OF_MODEL["output.weight"])
    try:
        config = from_gguf(
            _with_vocabulary_of(metadata, stored),
            tie_embeddings="output.weight" not in stored,
            rope_factors=None if factors is None else factors[:].tolist(),
            attention_bias="blk.0.attn_output.bias" in stored,  # a bias on q, k and v alone fails the strict check
            mlp_bias="blk.0.ffn_down.bias" in stored,
        )
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    expected = expected_shapes(config)
    wanted = {gguf_name(name): shape for name, shape in expected.items()}
    check_shapes({name: tensor.shape for name, tensor in stored.items()}, wanted, path)
    if alone:
        warnings.warn(f"{path}: no token_embd.weight; output.weight is read as both tables", stacklevel=2)
    tensors = {name: stored[gguf_name(name)] for name in expected}
    kept = _as_stored(config, tensors, path)
    quantised = any(kind not in HALVES for kind in kept.encodings.values())
    return Checkpoint(config, tensors, path, stored=kept if kept.encodings else None, keeps_stored=quantised)


def _as_stored(config: LlamaConfig, tensors: Mapping[str, GgufTensor], path: Path) -> Checkpoint:
    """The same tensors, each matrix that is narrower than float32 as the fields of its blocks.

    A matrix of a type whose blocks are not known here keeps its floats beside its type's name: whoever multiplies refuses it.
    """
    weights: dict[str, TensorSource] = {}
    encodings = {}
    for name, tensor in tensors.items():
        stem, kind = name.rpartition(".")[0], tensor.kind
        if len(tensor.shape) != 2 or kind in ("f32", "f64"):
            weights[name] = tensor
            continue
        encodings[stem] = kind
        if kind not in BLOCKS:
            weights[name] = tensor
            continue
        fields = block_fields(kind, (tensor.shape[0], tensor.shape[1]), tensor.path, tensor.offset_bytes)
        weights |= {f"{stem}.{part}": source for part, source in fields.items()}
    return Checkpoint(config, weights, path, "stored", encodings)


def _parts(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The metadata of a file, and its tensors with those of the parts that belong to it (gguf-split's naming)."""
    header = read_header(path)
    stored = _map_tensors(path, header.tensors)
    count = header.metadata.get("split.count", 1)
    if count in (0, 1):
        return header.metadata, stored
    named = PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count or header.metadata.get("split.no", 0) != 0:
        raise CheckpointError(f"{path}: one of {count} parts, not named as the first: merge them by gguf-split")
    for number in range(1, count):
        part = path.with_name(f"{named['stem']}-{number + 1:05d}-of-{named['count']}.gguf")
        if not part.is_file():
            raise CheckpointError(f"{path}: the first of {count} parts, and {part.name} is not beside it")
        further = read_header(part)
        if (further.metadata.get("split.no"), further.metadata.get("split.count")) != (number, count):
            raise CheckpointError(f"{part}: is not part {number + 1} of {count} of {path.name}")
        twice = sorted(stored.keys() & further.tensors.keys())
        if twice:
            raise CheckpointError(f"{part}: holds {twice[0]}, as an earlier part does")
        stored |= _map_tensors(part, further.tensors)
    return header.metadata, stored


def _with_vocabulary_of(metadata: dict[str, Any], stored: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """The metadata with the vocabulary's size that the embedding table has, where the list of tokens has it too."""
    stated, tokens = metadata.get("llama.vocab_size"), metadata.get("tokenizer.ggml.tokens")
    table = stored.get("token_embd.weight")
    if stated is None or table is None or not isinstance(tokens, list) or len(tokens) in (stated, 0):
        return metadata
    if table.shape[0] != len(tokens):
        return metadata
    warnings.warn(f"llama.vocab_size={stated} is ignored: tokens and embeddings are {len(tokens)}", stacklevel=2)
    return metadata | {"llama.vocab_size": len(tokens)}


def _map_tensors(path: Path, places: dict[str, TensorPlace]) -> dict[str, GgufTensor]:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise CheckpointError(f"{path}: reading GGUF needs the package gguf (pip install gguf)") from error
    sizes = {kind.value: size for kind, size in GGML_QUANT_SIZES.items()}  # (weights, bytes) of a block
    size = path.stat().st_size
    tensors = {}
    for name, place in places.items():
        if place.ggml_type not in sizes:
            called = f"the GGML type {place.ggml_type} ({RECENT.get(place.ggml_type, 'unknown')})"
            raise CheckpointError(f"{path}: {name} has {called}, which gguf {version('gguf')} does not know")
        kind = GGMLQuantizationType(place.ggml_type)
        if not _decodes(kind, sizes[place.ggml_type][1]):
            why = "not as floats" if kind.name in INTEGERS else f"which gguf {version('gguf')} cannot decode"
            raise CheckpointError(f"{path}: {name} is stored as {kind.name}, {why}")
        block_columns, block_bytes = sizes[place.ggml_type]
        rows, columns = (1, 1, *place.shape)[-2:]
        if len(place.shape) not in (1, 2) or columns % block_columns:
            raise CheckpointError(f"{path}: {name} of shape {list(place.shape)} cannot be read as {kind.name}")
        row_bytes = columns // block_columns * block_bytes
        end = place.offset_bytes + rows * row_bytes
        if end > size:
            raise CheckpointError(f"{path}: truncated: {name} ends at byte {end} of a file of {size}")
        dtype = PLAIN.get(place.ggml_type, torch.float32)
        tensors[name] = GgufTensor(place.shape, dtype, place.ggml_type, path, place.offset_bytes, row_bytes)
    return tensors


@cache
def _decodes(kind: Any, block_bytes: int) -> bool:
    """Whether the gguf package turns this GGML type into floats: it knows more types than it decodes."""
    import numpy
    from gguf.quants import dequantize

    if kind.value in PLAIN:
        return True
    try:
        dequantize(numpy.zeros((1, block_bytes), dtype=numpy.uint8), kind)
    except NotImplementedError:
        return False
    return True

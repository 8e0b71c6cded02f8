"""Meta's own directories: params.json and consolidated.NN.pth, one file per rank of a model-parallel group; and gpt-fast's
model.pth, which has Meta's names but q, k and v in one matrix.

The names are the canonical ones. A rank holds rows of the matrices that read the residual stream and columns of those
that write it; how the embedding table was cut changed with Llama 3, and shows in its shape.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_ref.config import LlamaConfig
from llama_ref.formats import huggingface, pickled_files
from llama_ref.formats.meta_config import from_meta
from llama_ref.formats.safetensors_files import read_json
from llama_ref.formats.tied_tables import settle_tables
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

PARAMS = "params.json"
FIRST_SHARD = "consolidated.00.pth"
GPT_FAST_FILE = "model.pth"
CUT_BY_COLUMNS = re.compile(r"\.(attention\.wo|feed_forward\.w2)\.weight$")
CUT_BIAS = re.compile(r"\.(attention\.w[qkv]|feed_forward\.w[13])\.bias$")
HARMLESS = re.compile(
    r"(^|\.)(rope\.freqs|freqs_cis|inv_freq|causal_mask)$|\.kv_cache\."
)  # buffers that were saved along


@dataclass(frozen=True)
class Merged:
    """Parts of one tensor, of one after another along `axis`; a slice reads only the parts that it touches."""

    parts: Sequence[TensorSource]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.parts[0].shape)
        sizes[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(sizes)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def __getitem__(self, key: Key, /) -> torch.Tensor:
        wanted = [slice(*span) for span in spans(key, self.shape)]
        start, stop = wanted[self.axis].start, wanted[self.axis].stop
        found: list[torch.Tensor] = []
        offset = 0
        for part in self.parts:
            size = part.shape[self.axis]
            inside = slice(min(max(start - offset, 0), size), min(max(stop - offset, 0), size))
            if inside.start < inside.stop or not found:
                cut = (*wanted[: self.axis], inside, *wanted[self.axis + 1 :])
                found.append(part[cut])
            offset += size
        return found[0] if len(found) == 1 else torch.cat(found, self.axis)


@dataclass(frozen=True)
class Rows:
    """Some rows of a stored tensor, as a tensor of its own: wq of gpt-fast's wqkv."""

    stored: TensorSource
    first: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.stored.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def __getitem__(self, key: Key, /) -> torch.Tensor:
        (start, stop), *columns = spans(key, self.shape)
        cut = (slice(self.first + start, self.first + stop), *(slice(*span) for span in columns))
        return self.stored[cut]


def is_meta(directory: Path) -> bool:
    """Whether a directory's weights are Meta's or gpt-fast's files, and no Hugging Face checkpoint stands beside them."""
    if huggingface.is_huggingface(directory):
        return False
    return (directory / GPT_FAST_FILE).is_file() or any(directory.glob("consolidated.*.pth"))


def open_meta(directory: Path, file: str | None = None) -> Checkpoint:
    """Open a directory of Meta's, or (`file` says it, or nothing else is there) its model.pth; raises CheckpointError."""
    shards = [] if file == GPT_FAST_FILE else _shards(directory)
    if shards:
        stored = _merge([pickled_files.open_file(path) for path in shards], directory)
    elif (directory / GPT_FAST_FILE).is_file():
        stored = dict(pickled_files.open_file(directory / GPT_FAST_FILE))
    else:
        raise CheckpointError(f"{directory}: neither {FIRST_SHARD} nor {GPT_FAST_FILE}")
    stored = {name: tensor for name, tensor in stored.items() if not HARMLESS.search(name)}
    config = _config(directory, stored)
    alone = "output.weight" in stored and "tok_embeddings.weight" not in stored
    stored = _separate(stored, config)
    stored, config = settle_tables(stored, config, ("tok_embeddings", "output"), directory)
    expected = expected_shapes(config)
    check_shapes({name: tuple(tensor.shape) for name, tensor in stored.items()}, expected, directory)
    check_floats(stored, directory)
    if alone and not (directory / "config.json").is_file():  # which would say that the model is tied
        warnings.warn(f"{directory}: no tok_embeddings.weight; output.weight is read as both tables", stacklevel=2)
    return Checkpoint(config, {name: stored[name] for name in expected}, directory)


def _shards(directory: Path) -> list[Path]:
    """consolidated.00.pth, .01, ...; CheckpointError where one of the row is missing."""
    found = sorted(path for path in directory.glob("consolidated.*.pth") if path.name.split(".")[1].isdecimal())
    ranks = [int(path.name.split(".")[1]) for path in found]
    gap = next((rank for rank, there in enumerate(ranks) if rank != there), None)
    if gap is not None:
        raise CheckpointError(f"{directory}: consolidated.{gap:02d}.pth is missing")
    return found


def _config(directory: Path, stored: Mapping[str, TensorSource]) -> LlamaConfig:
    if (directory / "config.json").is_file():
        return huggingface.read_config(directory)
    path = next((path for path in (directory / PARAMS, directory / "original" / PARAMS) if path.is_file()), None)
    if path is None:
        raise CheckpointError(f"{directory}: weights without a config; put their config.json or {PARAMS} beside them")
    tables = [stored[name] for name in ("tok_embeddings.weight", "output.weight") if name in stored]
    try:
        return from_meta(
            read_json(path),
            vocab_size=tables[0].shape[0] if tables else None,
            tie_embeddings=len(tables) < 2,
        )
    except CheckpointError:
        raise
    except (ValueError, TypeError, ArithmeticError, IndexError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _merge(ranks: Sequence[Mapping[str, TensorSource]], directory: Path) -> dict[str, TensorSource]:
    """The whole tensors of a model-parallel group."""
    first = ranks[0]
    for number, rank in enumerate(ranks):
        odd = sorted(set(first) ^ set(rank)) or [
            name
            for name in first
            if len(first[name].shape) != len(rank[name].shape) or first[name].dtype != rank[name].dtype
        ]
        if odd:
            raise CheckpointError(f"{directory}: consolidated.{number:02d}.pth does not match the first in {odd[0]}")
    if len(ranks) == 1:
        return dict(first)
    merged: dict[str, TensorSource] = {}
    for name, tensor in first.items():
        parts = [rank[name] for rank in ranks]
        axis = _cut_axis(name, tensor, first)
        if axis is None:
            merged[name] = tensor
            continue
        others = {tuple(size for i, size in enumerate(part.shape) if i != axis) for part in parts}
        if len(others) != 1:
            raise CheckpointError(f"{directory}: the parts of {name} do not fit together")
        merged[name] = Merged(parts, axis)
    return merged


def _cut_axis(name: str, tensor: TensorSource, rank: Mapping[str, TensorSource]) -> int | None:
    """Along which axis the ranks of a group share a tensor; None where each holds all of it."""
    if len(tensor.shape) != 2:  # norms are whole everywhere; a bias is cut where the rows are, else added once
        return 0 if CUT_BIAS.search(name) else None
    if name == "tok_embeddings.weight":  # Llama 3 cuts the vocabulary, Llama 1 and 2 the width
        norm = rank.get("norm.weight")
        return 0 if norm is not None and tensor.shape[1] == norm.shape[0] else 1
    return 1 if CUT_BY_COLUMNS.search(name) else 0


def _separate(stored: Mapping[str, TensorSource], config: LlamaConfig) -> dict[str, TensorSource]:
    """gpt-fast's `attention.wqkv` as wq, wk and wv."""
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    found: dict[str, TensorSource] = {}
    for name, tensor in stored.items():
        if ".attention.wqkv." not in name or len(tensor.shape) < 1 or tensor.shape[0] != q_rows + 2 * kv_rows:
            found[name] = tensor
            continue
        for part, start, count in (("wq", 0, q_rows), ("wk", q_rows, kv_rows), ("wv", q_rows + kv_rows, kv_rows)):
            found[name.replace("wqkv", part)] = Rows(tensor, start, count)
    return found

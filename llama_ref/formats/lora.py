"""LoRA directories of PEFT: adapter_config.json, and adapter_model.safetensors (or .bin) with what it adds to a model.

    with_adapter(open_checkpoint("llama"), "adapter") -> the checkpoint of the adapted model

A pair of matrices is merged into a dense weight as that is read, and kept beside an encoded one. Names and rows in the file are
Hugging Face's, whatever layout the model has: rows of q and k are put into Meta's order.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llama_ref.arguments import named
from llama_ref.config import LlamaConfig
from llama_ref.formats import pickled_files, safetensors_files
from llama_ref.formats.huggingface import InterleavedRows, huggingface_name, is_rotary
from llama_ref.formats.lora_config import LoraConfig, lora_config
from llama_ref.formats.low_rank import Merged, Transposed
from llama_ref.formats.weight_files import ADAPTERS
from llama_ref.weights import (
    FLOATS,
    Checkpoint,
    CheckpointError,
    LowRank,
    TensorSource,
    check_floats,
    check_shapes,
    expected_shapes,
)

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
TABLES = ("tok_embeddings", "output")
MAGNITUDE = "lora_magnitude_vector"
COPIES = ("modules_to_save", "original_module")
"""peft's names for the two sides of a module that is stored whole: with bias="all" it stores their biases once more, unread."""


@dataclass(frozen=True)
class Adapter:
    """What a directory adds to a model, under canonical names: pairs and vectors by stem, whole tensors by name.

    `own` are the stems that were trained whole: a table among them is no longer tied to the other.
    """

    pairs: dict[str, LowRank] = field(default_factory=dict)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    whole: dict[str, TensorSource] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)


def with_adapter(checkpoint: Checkpoint, directory: str | Path) -> Checkpoint:
    """The checkpoint of the adapted model; raises CheckpointError, one line.

    Where a tied model's adapter changes one table, the other stays as it is, and the config returned is not tied. Applied again
    to dense weights, a second adapter is added to the first.
    """
    directory = Path(named("adapter", directory)).expanduser()
    if checkpoint.low_rank:
        raise CheckpointError(f"{directory}: an adapter stands beside the encoded weights already, and no second can")
    adapter = open_adapter(directory, checkpoint)
    weights = dict(checkpoint.weights)
    config = _settle_tables(weights, checkpoint.config, adapter)
    for name, tensor in adapter.whole.items():
        stem, _, kind = name.rpartition(".")
        for part in _parts(weights, stem) if kind == "weight" else ():  # those of an encoding
            del weights[part]
        weights[name] = tensor
    config = _add_vectors(weights, config, adapter)
    beside: dict[str, LowRank] = {}
    for stem, pair in adapter.pairs.items():
        name = f"{stem}.weight"
        if _parts(weights, stem) == [name] and weights[name].dtype in FLOATS:
            weights[name] = Merged(weights[name], pair)
        elif stem == "tok_embeddings" or pair.magnitude is not None:
            what = "the table of embeddings" if pair.magnitude is None else f"{stem} with a magnitude (DoRA)"
            raise CheckpointError(
                f"{directory}: adapts {what}, which the model stores as {checkpoint.encoding}: adapt the dense model"
            )
        else:
            beside[stem] = pair
    return dataclasses.replace(checkpoint, config=config, weights=weights, low_rank=beside)


def open_adapter(directory: Path, checkpoint: Checkpoint) -> Adapter:
    """What the directory holds for a model, every tensor accounted for; raises CheckpointError."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory: an adapter is one that peft's save_pretrained wrote")
    data = safetensors_files.read_json(directory / CONFIG)
    file = next((directory / name for name in ADAPTERS if (directory / name).is_file()), directory / ADAPTERS[0])
    stored: Mapping[str, TensorSource]
    stored = pickled_files.open_file(file) if file.suffix == ".bin" else safetensors_files.open_file(file)
    try:
        lora = lora_config(data, directory / CONFIG)
        reader = _Reader(stored, lora, checkpoint.config)
        reader.read()
        if not reader.scales:
            raise ValueError(f"target_modules={lora.targets!r:.80} names no module of this model")
    except CheckpointError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from error
    check_shapes({name: tuple(tensor.shape) for name, tensor in stored.items()}, reader.wanted, file)
    check_floats(stored, file)
    _say_base(lora.base_model, checkpoint.path, directory)
    return reader.adapter()


class _Reader:
    """One file against one model: `wanted`, the names and shapes that it must have, and what they stand for."""

    def __init__(self, stored: Mapping[str, TensorSource], lora: LoraConfig, config: LlamaConfig):
        self.stored, self.lora, self.config = stored, lora, config
        self.wanted: dict[str, tuple[int, ...]] = {}
        self.scales: dict[str, float] = {}
        self.whole: dict[str, str] = {}
        self.own: set[str] = set()

    def read(self) -> None:
        """Find all that is wanted."""
        for name, shape in expected_shapes(dataclasses.replace(self.config, tie_embeddings=False)).items():
            stem, _, kind = name.rpartition(".")
            paired = not stem.endswith("norm") and self._is_paired(stem)
            if paired and kind == "weight":
                self._want_pair(stem, shape)
            saved = not paired and self.lora.is_saved(_module(stem))
            if saved:
                self.own.add(stem)
            trained = kind == "bias" and self.lora.bias in (("all", "lora_only") if paired else ("all",))
            stored = f"{PREFIX}{_module(stem)}.{'base_layer.' if paired else ''}{kind}"
            if saved or trained or stored in self.stored:
                self.wanted[stored] = shape
                self.whole[name] = stored
            for copy in COPIES if saved and kind == "bias" else ():
                if f"{PREFIX}{_module(stem)}.{copy}.bias" in self.stored:
                    self.wanted[f"{PREFIX}{_module(stem)}.{copy}.bias"] = shape

    def _is_paired(self, stem: str) -> bool:
        tied = self.lora.ties_tables and stem in TABLES  # the other table's pair, stored once more
        return self.lora.has_pair(_module(stem)) or (tied and f"{PREFIX}{_names(stem)[0]}" in self.stored)

    def _want_pair(self, stem: str, shape: tuple[int, ...]) -> None:
        module, r = _module(stem), self.lora.rank(_module(stem))
        down, up = (f"{PREFIX}{name}" for name in _names(stem))
        if stem == TABLES[0]:
            if self.lora.dora:
                raise ValueError(f"use_dora=true is not supported for {module}, a table that is looked up")
            self.wanted |= {down: (r, shape[0]), up: (shape[1], r)}
        else:
            self.wanted |= {down: (r, shape[1]), up: (shape[0], r)}
            if self.lora.lora_bias:
                self.wanted[f"{PREFIX}{module}.lora_B.bias"] = shape[:1]
            if self.lora.dora:
                self.wanted[f"{PREFIX}{module}.{MAGNITUDE}"] = shape[:1]
        self.scales[stem] = self.lora.scale(module)

    def adapter(self) -> Adapter:
        """What was found, when it is all there."""
        adapter = Adapter(own=self.own)
        for stem, scale in self.scales.items():
            down, up = (self.stored[f"{PREFIX}{name}"] for name in _names(stem))
            if stem == TABLES[0]:  # of E^T: up @ down is [D, V]
                adapter.pairs[stem] = LowRank(Transposed(down), Transposed(up), scale)
                continue
            length = self.stored.get(f"{PREFIX}{_module(stem)}.{MAGNITUDE}")
            length = None if length is None else self._in_order(f"{stem}.weight", length)
            adapter.pairs[stem] = LowRank(self._in_order(f"{stem}.weight", up), down, scale, length)
            bias = self.stored.get(f"{PREFIX}{_module(stem)}.lora_B.bias")
            if bias is not None:
                adapter.vectors[stem] = scale * self._in_order(f"{stem}.bias", bias)[:].double()
        for name, stored in self.whole.items():
            adapter.whole[name] = self._in_order(name, self.stored[stored])
        return adapter

    def _in_order(self, name: str, rows: TensorSource) -> TensorSource:
        return InterleavedRows(rows, self.config.head_dim) if is_rotary(name) else rows


def _module(stem: str) -> str:
    """ "layers.3.attention.wq" -> "model.layers.3.self_attn.q_proj"."""
    return huggingface_name(f"{stem}.weight").removesuffix(".weight")


def _names(stem: str) -> tuple[str, str]:
    """The stored names of a module's pair, the one that meets the input first: [r, in], [out, r]."""
    module = _module(stem)
    if stem == TABLES[0]:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _parts(weights: Mapping[str, TensorSource], stem: str) -> list[str]:
    """The names of a matrix's parts: the weight, and what else an encoding has; not the bias."""
    return [name for name in weights if name.rpartition(".")[0] == stem and name != f"{stem}.bias"]


def _settle_tables(weights: dict[str, TensorSource], config: LlamaConfig, adapter: Adapter) -> LlamaConfig:
    """The tables of a tied model, as two where the adapter has a pair for one, or one of its own; the config they fit.

    A table that the file holds for another reason, as the base of a pair, is the one that both share.
    """
    if not config.tie_embeddings:
        return config
    embeddings, output = TABLES
    shared = [adapter.whole.pop(f"{stem}.weight", None) for stem in TABLES if stem not in adapter.own]
    for table in [table for table in shared if table is not None][:1]:
        for part in _parts(weights, embeddings):
            del weights[part]
        weights[f"{embeddings}.weight"] = table
    if not any(stem in adapter.pairs or stem in adapter.own for stem in TABLES):
        return config
    for part in _parts(weights, embeddings):
        weights[f"{output}{part.removeprefix(embeddings)}"] = weights[part]
    return dataclasses.replace(config, tie_embeddings=False)


def _add_vectors(weights: dict[str, TensorSource], config: LlamaConfig, adapter: Adapter) -> LlamaConfig:
    """Biases of pairs, added to those of the model; a model without any gets zeros besides. The config that they fit."""
    stems = adapter.vectors
    attention, mlp = (any(f".{part}." in stem for stem in stems) for part in ("attention", "feed_forward"))
    config = dataclasses.replace(
        config, attention_bias=config.attention_bias or attention, mlp_bias=config.mlp_bias or mlp
    )
    for name, shape in expected_shapes(config).items() if stems else ():
        stem, _, kind = name.rpartition(".")
        if kind == "bias":
            bias = weights[name][:] if name in weights else torch.zeros(shape)
            weights[name] = (bias.double() + stems[stem]).to(torch.float32) if stem in stems else bias
    return config


def _say_base(base: str, path: Path | None, directory: Path) -> None:
    """A warning where the adapter names another model than the one at `path`."""
    name = base.rstrip("/").rpartition("/")[2]
    if path is None or not name:
        return
    where = path.resolve()
    known = {where.name, where.stem, *(part.rpartition("--")[2] for part in where.parts if part.startswith("models--"))}
    if name.lower() not in {one.lower() for one in known}:
        told = " ".join(f"{base!r:.100}".split())
        warnings.warn(f"{directory}: made for the model {told}, and applied to {path}", stacklevel=4)

"""Write a checkpoint in Hugging Face's layout or in Meta's. Only names and the order of rows change: no number does.

What one layout cannot say travels beside it as the file that says it: config.json in a directory of Meta's, params.json
in one of Hugging Face's. So a way there and back gives the same tensors, bit for bit, and the same config. A GGUF file
says it all itself.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llama_ref.arguments import named
from llama_ref.checkpoint import open_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.formats import safetensors_files
from llama_ref.formats.hf_config import to_hf
from llama_ref.formats.huggingface import halve, huggingface_name, is_rotary
from llama_ref.formats.meta_config import from_meta, to_meta
from llama_ref.formats.meta_layout import FIRST_SHARD, PARAMS, is_meta
from llama_ref.formats.saved import appears_whole, is_saved, unshared
from llama_ref.formats.weight_files import NAMED
from llama_ref.tokenizers.chat_templates import template_files
from llama_ref.tokenizers.tokenizer import has_tokenizer, load_tokenizer
from llama_ref.tokenizers.tokenizer_files import COMPANIONS, JSON_FILE, RANDOM_FILE, SENTENCEPIECE_FILE
from llama_ref.weights import Checkpoint, CheckpointError, TensorSource, expected_shapes

CONFIG = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (JSON_FILE, SENTENCEPIECE_FILE, RANDOM_FILE)
SHARD_BYTES = 5_000_000_000


def convert(source: str | Path, target: str | Path, to: str | None = None, shard_bytes: int = SHARD_BYTES) -> str:
    """Write the checkpoint at `source` as a directory `target`, which must be new or empty; the layout written.

    `to`: "hf" or "meta"; None is the other one than the source has ("hf" for what has neither). Of a GGUF file, config
    and tokenizer come from its own metadata, whatever stands beside it. Raises CheckpointError, and TokenizerError if
    the source's tokenizer cannot be read.
    """
    source, target = (Path(named(*one)).expanduser() for one in (("source", source), ("target", target)))
    checkpoint = open_checkpoint(source)
    if checkpoint.encoding != "dense":
        raise CheckpointError(f"{source}: stored as {checkpoint.encoding}; convert the checkpoint it was made from")
    assert checkpoint.path is not None
    of_gguf = checkpoint.path.is_file()
    if to is None:
        to = "hf" if of_gguf or source.is_file() or is_meta(source) else "meta"
    if to not in WRITERS:
        raise CheckpointError(f"unknown layout {to!r} (known: {', '.join(WRITERS)})")
    with appears_whole(target) as draft:
        if not of_gguf:
            _copy_beside(checkpoint.path, draft)
        if not any((draft / name).is_file() for name in TOKENIZER_FILES) and has_tokenizer(source):
            load_tokenizer(source).save(draft)  # a GGUF's own
        if not (draft / CONFIG).is_file():
            dtype = str(checkpoint.weights["norm.weight"].dtype).removeprefix("torch.")
            (draft / CONFIG).write_text(json.dumps(to_hf(checkpoint.config) | {"dtype": dtype}, indent=2) + "\n")
        WRITERS[to](checkpoint, draft, shard_bytes)
        _check_same(open_checkpoint(draft).config, checkpoint.config, f"{source} as {to}")
    return to


def _copy_beside(directory: Path, draft: Path) -> None:
    """Copy what stands beside the weights and is kept as it is: a tokenizer's files, and those that say the config."""
    names = [PARAMS, *TOKENIZER_FILES, *COMPANIONS, *template_files(directory)]
    if not is_saved(directory) and (directory / CONFIG).is_file():  # our own carries a mark
        names += [CONFIG, GENERATION_FILE]  # the second adds to the first, and is not read without it
    for name in names:
        if (directory / name).is_file():
            (draft / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(directory / name, draft / name)
    config = safetensors_files.read_json(draft / CONFIG) if (draft / CONFIG).is_file() else {}
    if config.pop(NAMED, None) is not None:  # names a file that is not written
        (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_same(written: LlamaConfig, config: LlamaConfig, where: str) -> None:
    """Raise CheckpointError, by field, unless the config that was written reads as the one that was meant."""
    names = [field.name for field in dataclasses.fields(config)]
    changed = [
        f"{name}={getattr(written, name)!r}, not {getattr(config, name)!r}"
        for name in names
        if getattr(written, name) != getattr(config, name)
    ]
    if changed:
        raise CheckpointError(f"{where} would read with {'; '.join(changed)}")


def _write_hf(checkpoint: Checkpoint, draft: Path, shard_bytes: int) -> None:
    config = checkpoint.config
    shards = list(_shards(checkpoint, shard_bytes))
    places: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        tensors = {huggingface_name(name): _hf_rows(name, checkpoint.weights[name], config) for name in names}
        total += sum(tensor.nbytes for tensor in tensors.values())
        file = safetensors_files.SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(tensors, file)
        safetensors_files.write_file(unshared(tensors), draft / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (draft / safetensors_files.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _hf_rows(name: str, tensor: TensorSource, config: LlamaConfig) -> torch.Tensor:
    rows = tensor[:].contiguous()
    return halve(rows, config.head_dim) if is_rotary(name) else rows


def _shards(checkpoint: Checkpoint, shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, as many to a list as fit into `shard_bytes`."""
    names: list[str] = []
    held = 0
    for name, shape in expected_shapes(checkpoint.config).items():
        size = checkpoint.weights[name].dtype.itemsize
        for extent in shape:
            size *= extent
        if names and held + size > shard_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _write_meta(checkpoint: Checkpoint, draft: Path, shard_bytes: int) -> None:
    """One file for all ranks. A tied table is written under both names, and stored once."""
    config = checkpoint.config
    if not (draft / PARAMS).is_file():
        (draft / PARAMS).write_text(json.dumps(_checked_params(config)) + "\n")
    tensors = {name: checkpoint.weights[name][:].contiguous() for name in expected_shapes(config)}
    if config.tie_embeddings:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    torch.save(tensors, draft / FIRST_SHARD)


def _checked_params(config: LlamaConfig) -> Mapping[str, Any]:
    """The params.json of a config, which read by itself gives the same shape and arithmetic."""
    try:
        params = to_meta(config)
        said = from_meta(params, max_context=config.max_context, tie_embeddings=config.tie_embeddings)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if dataclasses.replace(said, bos_id=config.bos_id, eos_ids=config.eos_ids) != config:
        raise CheckpointError(f"Meta's {PARAMS} cannot say this config: {config}")
    return params


WRITERS: dict[str, Callable[[Checkpoint, Path, int], None]] = {"hf": _write_hf, "meta": _write_meta}

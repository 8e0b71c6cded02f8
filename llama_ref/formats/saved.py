"""Directories that we write ourselves: canonical names as they stand, and linear weights possibly encoded.

`config.json` is in Hugging Face's form plus an entry `"llama_fast": {"encoding": "int8", "format": 1}`, and in it where single
matrices are stored otherwise than the rest `"encodings": {"output": "dense"}`. An encoded matrix X is stored as the parts of its
encoding, `X.weight`, `X.scale` and so on, which only the encoding can check; what has floats alone under its name is stored
as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from llama_ref.config import LlamaConfig
from llama_ref.formats.hf_config import from_hf, to_hf
from llama_ref.formats.safetensors_files import SINGLE, read_json, write_file
from llama_ref.formats.tied_tables import settle_tables
from llama_ref.formats.weight_files import open_weights
from llama_ref.weights import FLOATS, Checkpoint, CheckpointError, TensorSource, check_shapes, expected_shapes

FORMAT = 1


class SavesItself(Protocol):
    """What save_checkpoint needs of a tokenizer."""

    def save(self, directory: Path) -> None: ...


def is_saved(directory: Path) -> bool:
    """Whether a directory's config.json carries our mark."""
    config = directory / "config.json"
    return config.is_file() and "llama_fast" in read_json(config)


def open_saved(directory: Path) -> Checkpoint:
    """Open what save_checkpoint wrote; raises CheckpointError."""
    data = read_json(directory / "config.json")
    mark = data["llama_fast"]
    version, encoding = (mark.get("format"), mark.get("encoding")) if isinstance(mark, dict) else (None, None)
    if version != FORMAT:
        raise CheckpointError(f"{directory}: saved in format {version!r}; this version reads format {FORMAT}")
    try:
        config = from_hf(data, directory / "config.json")
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from error
    weights, config = settle_tables(open_weights(directory), config, ("tok_embeddings", "output"), directory)
    check_whole(weights, config, encoding, directory)
    return Checkpoint(
        config, weights, directory, str(encoding), exceptions(mark.get("encodings", {}), config, directory)
    )


def exceptions(told: object, config: LlamaConfig, where: object) -> dict[str, str]:
    """Which matrices are stored otherwise, and how; CheckpointError for what names no matrix of the model, or no encoding."""
    if not isinstance(told, dict) or not all(isinstance(name, str) for name in told.values()):
        raise CheckpointError(f"{where}: encodings is {str(told)[:100]}, not a name for each matrix")
    unknown = [stem for stem in told if len(expected_shapes(config).get(f"{stem}.weight", ())) != 2]
    if unknown:
        raise CheckpointError(
            f"{where}: encodings names {', '.join(unknown[:5])}, which this model has not as a matrix"
        )
    return dict(told)


def check_whole(tensors: Mapping[str, TensorSource], config: LlamaConfig, encoding: object, where: object) -> None:
    """Raise CheckpointError unless `tensors` are all of this model: floats of its shapes, or parts of encoded matrices."""
    if not isinstance(encoding, str):
        raise CheckpointError(f"{where}: its encoding is {encoding!r}, not a name")
    expected = expected_shapes(config)
    encoded = set() if encoding == "dense" else encoded_stems(tensors, expected)
    for stem in encoded:
        parts = [name for name in tensors if name.rpartition(".")[0] == stem and not name.endswith(".bias")]
        expected |= {name: tuple(tensors[name].shape) for name in parts}
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, where)
    packed = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOATS and name.rpartition(".")[0] not in encoded
    ]
    if packed:
        raise CheckpointError(f"{where}: not floating point, in encoding {encoding!r}: {', '.join(packed[:20])}")


def encoded_stems(tensors: Mapping[str, TensorSource], expected: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The matrices that are stored in several parts, or in one that is no plain floats: "layers.0.attention.wq"."""
    found: dict[str, list[str]] = {}
    for name in tensors:
        stem, _, part = name.rpartition(".")
        if len(expected.get(f"{stem}.weight", ())) == 2 and part != "bias":
            found.setdefault(stem, []).append(name)
    return {stem for stem, names in found.items() if len(names) > 1 or tensors[names[0]].dtype not in FLOATS}


def save_checkpoint(
    directory: str | Path,
    config: LlamaConfig,
    tensors: Mapping[str, TensorSource],
    encoding: str = "dense",
    tokenizer: SavesItself | None = None,
    encodings: Mapping[str, str] | None = None,
) -> None:
    """Write a directory that opens again on its own; it appears whole, or not at all.

    `encodings`: the matrices that are stored otherwise than the rest. Raises CheckpointError if `directory` exists and is not
    empty, if `tensors` are not those of the model, or if no config.json says what the model is.
    """
    directory = Path(directory).expanduser()
    check_can_be_said(config, directory)
    check_whole(tensors, config, encoding, directory)
    with appears_whole(directory) as draft:
        whole = {name: tensor[:].detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_file(unshared(whole), draft / SINGLE)
        mark: dict[str, object] = {"encoding": encoding, "format": FORMAT}
        data = to_hf(config) | {"llama_fast": mark | ({"encodings": dict(encodings)} if encodings else {})}
        (draft / "config.json").write_text(json.dumps(data, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(draft)


def check_can_be_said(config: LlamaConfig, directory: Path) -> None:
    """Raise CheckpointError unless a config.json of `config` reads as `config` again."""
    try:
        same = from_hf(to_hf(config)) == config
    except ValueError as error:
        raise CheckpointError(f"{directory}: no config.json can describe this model ({error})") from error
    if not same:
        raise CheckpointError(f"{directory}: no config.json can describe this model: it would read as another")


@contextlib.contextmanager
def appears_whole(directory: Path) -> Iterator[Path]:
    """A draft beside `directory` to write into, renamed to it at the end, removed on failure.

    Raises CheckpointError as check_can_write does, before and after the work.
    """
    check_can_write(directory)
    place = _place(directory)
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.parent / f".{place.name}-{uuid.uuid4().hex[:8]}"  # a rename within one file system
    draft.mkdir()
    if place.is_dir():  # empty, and perhaps for its owner's eyes only
        draft.chmod(stat.S_IMODE(place.stat().st_mode))
    try:
        yield draft
        check_can_write(directory)  # again: someone may have filled it meanwhile
        os.replace(draft, place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_can_write(directory: Path) -> None:
    """Raise CheckpointError unless `directory` can appear by a rename: it is absent, or empty and nothing holds it."""
    place = _place(directory)
    if place.is_dir():
        if any(place.iterdir()):
            raise CheckpointError(f"{directory}: the output directory exists and is not empty; name another")
        if place.samefile("."):  # replaced, it would leave the user's shell in a directory that is no more
            raise CheckpointError(f"{directory}: the output directory is the working directory; name another")
        if os.path.ismount(place):
            raise CheckpointError(f"{directory}: the output directory is a mount point; name one inside it")
    elif os.path.lexists(place):
        raise CheckpointError(f"{directory}: the output directory is a file; name another")
    parent = next(parent for parent in place.parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise CheckpointError(f"{parent}: is no directory, so {directory} cannot be written")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{parent}: may not be written to, so {directory} cannot appear there; name another")


def _place(directory: Path) -> Path:
    """The directory itself, absolute and behind all links: it is what a rename can replace."""
    return Path(os.path.realpath(directory.expanduser()))


def unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory: copy all but the first of each."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        partial = storage.nbytes() != tensor.nbytes  # a view of something larger, perhaps of another tensor here
        result[name] = tensor.clone() if partial or storage.data_ptr() in seen else tensor
        seen.add(storage.data_ptr())
    return result

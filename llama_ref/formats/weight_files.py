"""Which files of a Hugging Face directory hold its weights: the first that is there, in the order of transformers 5.24.

A single file comes before an index, which an earlier save in shards may have left behind, and safetensors before
pickles. A config.json may also name the file itself, as `transformers_weights`. What is left out is said in a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_ref.formats import pickled_files, safetensors_files
from llama_ref.formats.sharded_files import open_shards, places
from llama_ref.weights import CheckpointError, TensorSource

NAMED = "transformers_weights"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")  # of PEFT: changes to a model, which are not read
ORDER = (safetensors_files.SINGLE, safetensors_files.INDEX, pickled_files.SINGLE, pickled_files.INDEX)


def holds_weights(directory: Path) -> bool:
    """Whether a directory has a file of weights, or an index of some, under one of the names that are read."""
    return any((directory / name).is_file() for name in ORDER)


def open_weights(directory: Path, named: Any = None) -> Mapping[str, TensorSource]:
    """Every tensor by its stored name. `named` is what config.json states as transformers_weights; CheckpointError."""
    if named is not None:
        return _open(directory, _checked(named, directory))
    found = [name for name in ORDER if (directory / name).is_file()]
    if not found:
        wanted = f"neither {safetensors_files.SINGLE} nor {safetensors_files.INDEX}"
        raise CheckpointError(f"{directory}: {wanted}{told_instead(directory)}")
    if not pickled(found[0]) and not any(directory.glob("pytorch_model*.bin")):
        found = [name for name in found if not pickled(name)]  # the hub gives every .json, also the index of no files
    left_out = found[1:] + [name for name in ADAPTERS if (directory / name).is_file()]
    if left_out:
        warnings.warn(f"{directory}: {found[0]} is read; {', '.join(left_out)} left out", stacklevel=2)
    return _open(directory, found[0])


def header_texts(directory: Path, named: Any = None) -> dict[str, str]:
    """What the headers of the safetensors files that are read state besides tensors; {} of pickles."""
    found = [name for name in ORDER if (directory / name).is_file()] if named is None else [_checked(named, directory)]
    if not found or pickled(found[0]):
        return {}
    files = set(places(directory / found[0]).values()) if found[0].endswith(".json") else {found[0]}
    texts: dict[str, str] = {}
    for file in sorted(files):
        texts |= safetensors_files.header_texts(directory / file)
    return texts


def pickled(name: str) -> bool:
    """Whether a file of weights, or an index, is of pickles."""
    return name in (pickled_files.SINGLE, pickled_files.INDEX)


def _open(directory: Path, name: str) -> Mapping[str, TensorSource]:
    open_file: Callable[[Path], Mapping[str, TensorSource]]
    open_file = pickled_files.open_file if pickled(name) else safetensors_files.open_file
    return open_shards(directory, name, open_file) if name.endswith(".json") else open_file(directory / name)


def _checked(named: Any, directory: Path) -> str:
    """The file that a config.json names; one of this directory, and no pickle."""
    if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{directory / 'config.json'}: {NAMED}={named!r:.80} is no safetensors file or index")
    if Path(named).name != named or "\0" in named:
        raise CheckpointError(f"{directory / 'config.json'}: {NAMED}={named!r:.80} is no file of this directory")
    return named


def told_instead(directory: Path) -> str:
    """What stands there instead: a link whose file is gone, as of a cache that was emptied, or other names."""
    gone = [name for name in ORDER if (directory / name).is_symlink()]
    if gone:
        return f" ({gone[0]} is a link to {(directory / gone[0]).readlink()}, which is not there)"
    others = sorted(path.name for end in ("safetensors", "bin") for path in directory.glob(f"*.{end}"))
    return f" (found {', '.join(others[:3])}, which are not read)" if others else ""

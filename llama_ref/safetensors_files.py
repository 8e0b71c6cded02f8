"""safetensors, one file or many shards: tensors by their stored name, memory-mapped, read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from llama_ref.weights import CheckpointError, Key, spans

T = TypeVar("T")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of one memory-mapped file; `handle` is safetensors' own view of it, which copies what is asked for."""

    handle: Any
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, key: Key, /) -> torch.Tensor:
        parts = spans(key, self.shape)
        if any(start == stop for start, stop in parts):  # older safetensors refuse an empty slice
            return torch.empty([stop - start for start, stop in parts], dtype=self.dtype)
        part: torch.Tensor = self.handle[tuple(slice(start, stop) for start, stop in parts)]
        return part


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory's model.safetensors or of the shards that its index names; CheckpointError."""
    if (directory / INDEX).is_file():
        return _open_sharded(directory)
    if (directory / SINGLE).is_file():
        return open_file(directory / SINGLE)
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    hint = f" (found {', '.join(others[:3])}, which are not read)" if others else ""
    raise CheckpointError(f"{directory}: neither {SINGLE} nor {INDEX}{hint}")


def open_file(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file. A truncated file or a broken header is a CheckpointError: safetensors checks both."""
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="pt")
        tensors = {}
        for name in file.keys():  # noqa: SIM118 - not a dict: older safetensors cannot be iterated over
            handle = file.get_slice(name)
            tensors[name] = StoredTensor(handle, tuple(handle.get_shape()), _dtype(handle.get_dtype(), name, path))
        return tensors
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or no safetensors file ({_one_line(error)})") from error
    except RuntimeError as error:  # torch's, which maps the file
        raise CheckpointError(f"{path}: cannot be mapped into memory ({_one_line(error)})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; anything else is a CheckpointError that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({_one_line(error)})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return data


def _open_sharded(directory: Path) -> dict[str, StoredTensor]:
    return read_sharded(directory, INDEX, open_file)


def read_sharded(directory: Path, index: str, open_file: Callable[[Path], dict[str, T]]) -> dict[str, T]:
    """The tensors of all shards that an index names, each shard opened by `open_file`; CheckpointError."""
    places = read_json(directory / index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{directory / index}: has no weight_map of file names")
    shards = sorted(set(places.values()))
    outside = [shard for shard in shards if not shard or Path(shard).name != shard or "\0" in shard]
    if outside:
        raise CheckpointError(f"{directory / index}: names {outside[0]!r}, which is no file of this directory")
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise CheckpointError(f"{directory}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing[:20])}")
    opened = {shard: open_file(directory / shard) for shard in shards}
    strays = [f"{name} (by the index in {shard})" for name, shard in places.items() if name not in opened[shard]]
    if strays:
        raise CheckpointError(f"{directory}: {len(strays)} missing: {', '.join(strays[:20])}")
    return {name: tensor for shard in opened.values() for name, tensor in shard.items()}


def _dtype(name: str, tensor: str, path: Path) -> torch.dtype:
    if name not in DTYPES:
        raise CheckpointError(f"{path}: {tensor} is stored as {name}, which is not supported")
    return DTYPES[name]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

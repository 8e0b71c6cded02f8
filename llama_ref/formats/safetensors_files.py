"""safetensors: the tensors of one file by their stored name, memory-mapped and read slice by slice; and writing one."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_ref.formats import lfs_pointers
from llama_ref.weights import CheckpointError, Key, spans

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


def open_file(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file. A truncated file or a broken header is a CheckpointError: safetensors checks both."""
    from safetensors import SafetensorError, safe_open

    try:
        if lfs_pointers.is_pointer(path):
            raise CheckpointError(f"{path}: {lfs_pointers.TOLD}")
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


def header_texts(path: Path) -> dict[str, str]:
    """What the header of a file that opens states besides tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def write_file(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors, none of which shares memory with another, as a file with the mode that the user's umask gives.

    safetensors writes a temporary file that only its owner may read, and renames it.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


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


def _dtype(name: str, tensor: str, path: Path) -> torch.dtype:
    if name not in DTYPES:
        raise CheckpointError(f"{path}: {tensor} is stored as {name}, which is not supported")
    return DTYPES[name]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

"""Tensors that torch.save wrote (`.bin`, `.pth`): unpickled with `weights_only=True`, which runs no code of the file's.

Zip files are memory-mapped, so that a tensor's bytes are read when it is used; files older than PyTorch 1.6 are read whole.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from llama_ref.formats import lfs_pointers
from llama_ref.weights import CheckpointError

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


def open_file(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of one file by its stored name. A file that holds anything else is a CheckpointError."""
    try:
        if lfs_pointers.is_pointer(path):
            raise CheckpointError(f"{path}: {lfs_pointers.TOLD}")
        _check_size(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's, about storages of old files: nothing a user can act on
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, or not written by torch.save ({_one_line(error)})") from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes meet
        raise CheckpointError(f"{path}: truncated or not written by torch.save ({_one_line(error)})") from error
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        found = found["model"]  # as some trainers wrap it
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not tensors by name")
    strange = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise CheckpointError(f"{path}: {strange[0]!r} is a {type(found[strange[0]]).__name__}, not a tensor")
    odd = [name for name, value in found.items() if value.layout is not torch.strided or value.is_quantized]
    if odd:
        raise CheckpointError(f"{path}: {odd[0]!r} is stored as {found[odd[0]].layout}, not as plain numbers")
    empty = [name for name, value in found.items() if value.device.type != "cpu"]
    if empty:
        raise CheckpointError(f"{path}: {empty[0]!r} was saved without its numbers (device {found[empty[0]].device})")
    return {name: value.detach() for name, value in found.items()}


def _check_size(path: Path) -> None:
    """torch.save stores its zip entries as they are: one that would unpack to more than the file is damage, or a trap."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise CheckpointError(f"{path}: its entries are larger than the file")


def _one_line(error: BaseException) -> str:
    told = " ".join(str(error).split())
    return told.rpartition("WeightsUnpickler error: ")[2][:200]  # before it torch advises to trust the file

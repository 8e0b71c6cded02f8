"""What callers hand over, as the plain value that is meant: NumPy's numbers, tensors, ranges and generators are taken.

    whole("max_new_tokens", np.int64(5)) -> 5              whole("max_new_tokens", "5") -> TypeError
    row_of_ids("prompt", torch.tensor([[5, 9]])) -> [5, 9]

Every refusal is one line that names the argument: TypeError where the kind of value is wrong, ValueError where the value is.
"""

from __future__ import annotations

import numbers
import operator
import os
import reprlib
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

DTYPES = {
    "float64": torch.float64, "double": torch.float64,
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
}  # fmt: skip
"""The types of arithmetic, by every name that people give them."""


def shown(value: Any) -> str:
    """A value for an error's one line: as it is written if that is short, else its kind."""
    if isinstance(value, (torch.Tensor, Mapping)) and not isinstance(value, dict):
        shape = f"{list(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else f"of {len(value)}"
        return f"a {type(value).__name__} {shape}"
    plain = (
        str,
        bytes,
        bytearray,
        numbers.Number,
        type(None),
        type,
        list,
        tuple,
        dict,
        range,
        os.PathLike,
        torch.dtype,
    )
    if not isinstance(value, plain) and not hasattr(value, "__array__"):
        return f"a {type(value).__name__}"
    return " ".join(reprlib.repr(value).split())


def whole(name: str, value: Any, least: int | None = None) -> int:
    """One integer, and no True or 1.0."""
    if not is_whole(value):
        raise TypeError(f"{name}={shown(value)} must be a whole number")
    found = operator.index(value)
    if least is not None and found < least:
        raise ValueError(f"{name}={found} must be at least {least}")
    return found


def is_whole(value: Any) -> bool:
    """Whether a value is one integer, of Python or NumPy or in a tensor without dimensions."""
    if type(value) is int:
        return True
    if is_truth_or_several(value):
        return False
    try:
        operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor that holds no data
        return False
    return True


def is_truth_or_several(value: Any) -> bool:
    """Whether a value is True or False, of any library, or has dimensions: no one number, though Python may make one of it."""
    dtype = str(getattr(value, "dtype", ""))
    return isinstance(value, bool) or getattr(value, "ndim", 0) != 0 or dtype.endswith("bool")


def real(name: str, value: Any) -> float:
    """One number, and no True or "0.8". What range it must lie in, and that NaN lies in none, its user says."""
    wrong = isinstance(value, str) or is_truth_or_several(value)
    wrong = wrong or (isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real))
    try:
        if not wrong and (hasattr(value, "__float__") or hasattr(value, "__index__")):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise TypeError(f"{name}={shown(value)} must be a number")


def flag(name: str, value: Any) -> bool:
    """True or False, of Python or NumPy."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name}={shown(value)} must be True or False")
    return bool(value)


def text(name: str, value: Any) -> str:
    """A text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise TypeError(f"{name}={shown(value)} must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {value[error.start]!r} at {error.start} is half a character, not text") from None
    return str(value)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """One text, several or none: "END" -> ("END",); None -> ()."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (text(name, value),)
    return tuple(text(name, one) for one in several(name, value, "text, or several"))


def several(name: str, value: Any, wanted: str) -> list[Any]:
    """The entries of what has an order: a list, an array (in nested lists), a generator. TypeError for all else."""
    if hasattr(value, "ndim") and hasattr(value, "tolist"):
        try:
            listed = value.tolist()
        except RuntimeError:  # a tensor that holds no data, or not as rows
            listed = None
        if isinstance(listed, list):
            return listed
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, memoryview, Mapping, Set)):
        return list(value)
    raise TypeError(f"{name}={shown(value)} must be {wanted}")


def row_of_ids(name: str, value: Any) -> list[int]:
    """One row of token ids. An array [1, T], in which other libraries hand over one text, is its row."""
    entries = several(name, value, "token ids, a row of whole numbers")
    if getattr(value, "ndim", 1) == 2 and len(entries) == 1:
        entries = entries[0]
    for entry in entries:
        if not is_whole(entry):
            raise TypeError(f"{name} holds {shown(entry)}: token ids are whole numbers")
    return [operator.index(entry) for entry in entries]


def rows_of_ids(name: str, value: Any) -> list[list[int]]:
    """Rows of token ids: lists, arrays, or one array [B, T]."""
    return [row_of_ids(name, row) for row in several(name, value, "rows of token ids")]


def set_of_ids(name: str, value: Any) -> tuple[int, ...]:
    """Ids whose order says nothing: one, several or none."""
    if value is None:
        return ()
    if is_whole(value):
        return (operator.index(value),)
    return tuple(row_of_ids(name, list(value) if isinstance(value, Set) else value))


def floating(name: str, value: Any) -> torch.dtype:
    """A type of arithmetic: torch.bfloat16, "bfloat16", "bf16", "torch.bfloat16"."""
    found = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if isinstance(value, str) and found is None:
        raise ValueError(f"{name}: unknown dtype {value!r:.40} (known: float32, bfloat16, float16, float64)")
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name}={shown(value)} must be a torch.dtype, or the name of one")
    if found not in DTYPES.values():
        raise ValueError(f"{name}={found} must be a floating type: float32, bfloat16, float16 or float64")
    return found


def place(name: str, value: Any) -> torch.device:
    """A device that this library runs on: torch.device("cuda", 1), "cuda:1", 1, "cpu"."""
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(f"{name}={shown(value)} must be cpu, cuda or a torch.device")
    try:
        found = torch.device(value)
    except (RuntimeError, ValueError):
        raise ValueError(f"{name}={shown(value)} is no device: cpu or cuda, as cuda:1") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}={shown(value)}: this library runs on cpu and cuda")
    return found


def named(name: str, value: Any) -> str:
    """A model's name, or its path."""
    if isinstance(value, (str, Path)) or (isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)):
        return os.fspath(value)
    raise TypeError(f"{name}={shown(value)} must be a name or a path")


def made(name: str, value: T, wanted: str, *parts: str) -> T:
    """A value that has every one of `parts`; `wanted` says in words what it must be. A class is not one of its instances."""
    if isinstance(value, type):
        raise TypeError(f"{name}={value.__name__} is a class, not {wanted}: {value.__name__}(...) makes one")
    if not all(hasattr(value, part) for part in parts):
        raise TypeError(f"{name}={shown(value)} must be {wanted}")
    return value

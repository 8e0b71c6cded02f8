"""Where a model runs, and in which type, if nobody says otherwise."""

from __future__ import annotations

import torch

from llama_ref.arguments import place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def where(device: torch.device | str | None) -> torch.device:
    """The device that is meant: None or "auto" is a GPU if there is one. ValueError for one that is not there."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = place("device", device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but this PyTorch sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device} was asked for, but this PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def dtype_named(name: str | None, device: torch.device) -> torch.dtype:
    """ "bfloat16" -> torch.bfloat16; None is the device's default."""
    if name is None:
        return default_dtype(device)
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r} (known: {', '.join(DTYPES)})")
    return DTYPES[name]

"""Open a checkpoint: a path becomes a config and lazy tensors under canonical names, or one clear error.

The three layouts differ only in how they name and arrange the same tensors; each has its own file.
"""

from __future__ import annotations

from pathlib import Path

from llama_ref.random_weights import random_checkpoint
from llama_ref.saved import is_saved, open_saved, save_checkpoint
from llama_ref.weights import Checkpoint, CheckpointError, TensorSource, expected_shapes

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TensorSource",
    "expected_shapes",
    "open_checkpoint",
    "random_checkpoint",
    "save_checkpoint",
]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face directory, a GGUF file (or a directory that holds just one), or a directory of ours.

    Only headers are read here; a tensor's bytes are read when it is sliced. Raises CheckpointError.
    """
    from llama_ref import gguf_file, huggingface

    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: a single file must be a .gguf; for safetensors name its directory")
        return gguf_file.open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    if is_saved(path):
        return open_saved(path)
    if (path / "config.json").is_file():
        return huggingface.open_huggingface(path)
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return gguf_file.open_gguf(found[0])
    if found:
        raise CheckpointError(f"{path}: holds {len(found)} .gguf files; name one of them")
    if (path / "params.json").is_file():
        raise CheckpointError(f"{path}: Meta's consolidated.*.pth layout is not read; use the Hugging Face layout")
    raise CheckpointError(f"{path}: no config.json and no .gguf file in this directory")

"""Open a checkpoint: a path becomes a config and lazy tensors under canonical names, or one clear error.

The layouts differ only in how they name and arrange the same tensors; each has its own file.
"""

from __future__ import annotations

from pathlib import Path

from llama_ref.arguments import named
from llama_ref.formats.lora import with_adapter
from llama_ref.formats.saved import is_saved, open_saved, save_checkpoint
from llama_ref.random_weights import random_checkpoint
from llama_ref.weights import Checkpoint, CheckpointError, TensorSource, expected_shapes

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TensorSource",
    "expected_shapes",
    "open_checkpoint",
    "random_checkpoint",
    "save_checkpoint",
    "with_adapter",
]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model directory (Hugging Face, Meta, gpt-fast, or of ours) or a GGUF file.

    A directory's config.json is its config where there is one, else params.json, else its one GGUF file; which layout the
    weights have is told by their files' names. Of a directory with several, Hugging Face's comes first, if its
    config.json is there. A single file may be named instead of its directory. Only headers are read here; a tensor's
    bytes are read when it is sliced. Raises CheckpointError.
    """
    from llama_ref.formats import gguf_file, huggingface, meta_layout
    from llama_ref.formats.gguf_header import gguf_files
    from llama_ref.formats.weight_files import told_instead

    path = Path(named("path", path)).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return gguf_file.open_gguf(path)
        if path.name in (meta_layout.GPT_FAST_FILE, meta_layout.FIRST_SHARD):
            return meta_layout.open_meta(path.parent, path.name)
        raise CheckpointError(f"{path}: a single file must be a .gguf or a model.pth; for others name their directory")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    if is_saved(path):
        return open_saved(path)
    if meta_layout.is_meta(path):
        return meta_layout.open_meta(path)
    found = gguf_files(path)
    if (path / "config.json").is_file():
        if found and not huggingface.is_huggingface(path):
            names = ", ".join(file.name for file in found[:3])
            raise CheckpointError(f"{path}: config.json has no weights beside it but in {names}: name the .gguf file")
        return huggingface.open_huggingface(path)
    if len(found) == 1:
        return gguf_file.open_gguf(found[0])
    if found:
        raise CheckpointError(f"{path}: holds {len(found)} .gguf files; name one of them")
    instead = told_instead(path)
    if (path / meta_layout.PARAMS).is_file():
        raise CheckpointError(
            f"{path}: {meta_layout.PARAMS}, but neither {meta_layout.FIRST_SHARD} nor model.pth{instead}"
        )
    raise CheckpointError(f"{path}: no config.json, params.json or .gguf file in this directory{instead}")

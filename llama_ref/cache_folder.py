"""Where downloads and derived files are kept between runs: one folder of the user's."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path


def cache_folder() -> Path:
    """$LLAMA_FAST_CACHE, else $XDG_CACHE_HOME/llama-fast, else ~/.cache/llama-fast. It need not exist."""
    if chosen := os.environ.get("LLAMA_FAST_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "llama-fast"
    return Path.home() / ".cache" / "llama-fast"


def store(directory: Path, files: Mapping[str, str | bytes]) -> None:
    """Write a directory that appears whole; of two processes that do so at once, one wins and both are content."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = directory.with_name(f".{directory.name}-{uuid.uuid4().hex[:8]}")
    try:
        draft.mkdir()
        for name, content in files.items():
            (draft / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        shutil.rmtree(directory, ignore_errors=True)  # half of an older one
        os.replace(draft, directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)

"""Where downloads and derived files are kept between runs: one folder of the user's."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$LLAMA_FAST_CACHE, else $XDG_CACHE_HOME/llama-fast, else ~/.cache/llama-fast. It need not exist."""
    if chosen := os.environ.get("LLAMA_FAST_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "llama-fast"
    return Path.home() / ".cache" / "llama-fast"

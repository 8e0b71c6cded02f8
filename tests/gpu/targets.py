"""What `targets.toml` asks of a rung."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from llama_fast.ladder.bench import RungResult

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODEL = os.environ.get("LLAMA_FAST_GPU_MODEL", "random:llama-2-7b")
TARGETS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("targets.toml").read_text())


def target(rung: RungResult, gpu: str) -> tuple[float, str]:
    """Tokens per second that `rung` must reach on `gpu`, and where the figure is from."""
    entry = TARGETS.get(gpu, {})
    if rung.name in entry.get("tokens_per_second", {}) and rung.ranks in (1, 4):
        return entry["tokens_per_second"][rung.name], f"published for {rung.ranks} x {gpu}"
    shares = entry.get("share", {})
    share = shares.get(rung.name, TARGETS["generic"]["share"][rung.name])
    return share * rung.floor_tokens_per_second, f"{share:.0%} of the floor"

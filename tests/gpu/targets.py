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
KEPT = 0.97
"""The part of the share that was reached once that must be reached again."""
TARGETS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("targets.toml").read_text())


def target(rung: RungResult, gpu: str) -> tuple[float, str]:
    """Tokens per second that `rung` must reach on `gpu`, and where the figure is from."""
    entry = TARGETS.get(gpu, {})
    if rung.name in entry.get("tokens_per_second", {}) and rung.ranks in (1, 4):
        return entry["tokens_per_second"][rung.name], f"published for {rung.ranks} x {gpu}"
    generic = TARGETS["generic"]["share"]
    if rung.name not in generic:
        raise ValueError(f"targets.toml: [generic.share] says nothing of the rung {rung.name}")
    ranks = rung.ranks
    reached = entry.get("reached" if ranks == 1 else f"reached_by_{ranks}_ranks", {}).get(rung.name)
    if reached is not None:
        share = KEPT * reached
        return (
            share * rung.floor_tokens_per_second,
            f"{share:.1%} of the floor: {KEPT:.0%} of {reached:.1%}, reached before",
        )
    share = generic[rung.name]
    of = f"{gpu} by {ranks} ranks" if ranks > 1 else gpu
    whose = f"as for any GPU: targets.toml has no share of its own for {of}"
    return share * rung.floor_tokens_per_second, f"{share:.0%} of the floor, {whose}"


def bar(name: str, gpu: str) -> float:
    """The memory wall's bar of that name for `gpu`; the generic one where it has none."""
    generic = TARGETS["generic"]["wall"]
    if name not in generic:
        raise ValueError(f"targets.toml: [generic.wall] says nothing of {name}")
    return float(TARGETS.get(gpu, {}).get("wall", {}).get(name, generic[name]))

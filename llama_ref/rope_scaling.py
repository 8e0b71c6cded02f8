"""RopeScaling: how rotary frequencies are stretched for contexts longer than those of pre-training, as files state it.

A fact about a file. What follows from it, the angles, each of the two models derives on its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """One of four rules; a rule leaves the numbers that it does not use at their defaults.

    "linear" divides every frequency by `factor` (Chen et al. 2023). "llama3" divides those whose wavelength exceeds
    `original_context / low_freq_factor` positions, keeps those below `original_context / high_freq_factor`, and
    blends between the two. "yarn" (Peng et al. 2023) divides the pairs that turn fewer than `beta_slow` times within
    `original_context`, keeps those that turn more than `beta_fast` times, blends linearly in the pair's number between
    the two (borders rounded outwards if `truncate`), and multiplies q and k by `attention_factor` (None: 0.1 ln(factor)
    + 1). "dynamic" changes nothing up to the trained context; beyond it a frequency would depend on the length of the
    whole text, and a token's logits on the tokens after it, so there it ends.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rope_type={self.kind!r} is not supported (known: default, {', '.join(KINDS)})")
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ValueError(f"rope scaling factor={self.factor} must be a number of at least 1")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high) < math.inf:
                raise ValueError(
                    f"rope scaling {low}={getattr(self, low)} must lie between 0 and {high}={getattr(self, high)}"
                )
        if not 0 < self.original_context <= 1 << 40:
            raise ValueError(f"rope scaling original_context={self.original_context} must be positive")
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ValueError(f"rope scaling attention_factor={self.attention_factor} must be positive")


def hf_rope_scaling(rope: Mapping[str, Any], max_context: int) -> RopeScaling | None:
    """From `rope_parameters` or `rope_scaling` of a Hugging Face config.json; ValueError names the field."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported")
    if kind == "default":
        return None
    if kind not in KINDS:
        raise ValueError(f"rope_type={kind!r} is not supported (known: default, {', '.join(KINDS)})")
    factor = _number(rope, "factor")
    if kind == "llama3":
        return RopeScaling(
            kind,
            factor,
            low_freq_factor=_number(rope, "low_freq_factor"),
            high_freq_factor=_number(rope, "high_freq_factor"),
            original_context=int(_number(rope, "original_max_position_embeddings")),
        )
    if kind == "yarn":
        return RopeScaling(
            kind,
            factor,
            original_context=int(_number(rope, "original_max_position_embeddings", max_context)),
            beta_fast=_number(rope, "beta_fast", 32.0),
            beta_slow=_number(rope, "beta_slow", 1.0),
            attention_factor=_attention_factor(rope, factor),
            truncate=bool(rope.get("truncate", True)),
        )
    return RopeScaling(kind, factor)


def hf_rope_spelling(scaling: RopeScaling) -> dict[str, Any]:
    """The entry of a config.json that hf_rope_scaling reads back."""
    spelling: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        spelling |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        spelling |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        if scaling.attention_factor is not None:
            spelling["attention_factor"] = scaling.attention_factor
    if scaling.kind in ("llama3", "yarn"):
        spelling["original_max_position_embeddings"] = scaling.original_context
    return spelling


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    """As stated, or by the two weights that DeepSeek's files state in its place."""
    stated = rope.get("attention_factor")
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if stated is not None or not (above and below):
        return None if stated is None else _number(rope, "attention_factor")
    grown = 0.1 * math.log(factor)
    return (_number(rope, "mscale") * grown + 1) / (_number(rope, "mscale_all_dim") * grown + 1)


def _number(data: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = data.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} must be a number")
    return float(value)

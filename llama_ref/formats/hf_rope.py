"""The rotary fields of a Hugging Face config.json. Files put them in several places; who wins is as in transformers 5.24.

`rope_scaling`, the older name, comes before `rope_parameters` unless it is null or empty. `rope_theta` and
`partial_rotary_factor` may stand inside or at the top level: inside comes first. For `original_max_position_embeddings`
the top level does, and where neither states it, it is `max_position_embeddings`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from llama_ref.formats.fields import flag, number, whole
from llama_ref.rope_scaling import KINDS, RopeScaling

OF_EVERY_KIND = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
OF_KIND: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
}


def hf_rope(data: Mapping[str, Any], max_context: int, where: object) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a whole config.json. ValueError names the field; a warning says what is left unread."""
    rope = _stated_rope(data, where)
    kind = _kind(rope, where)
    _refuse_other_rotations(data, rope)
    unread = [name for name, value in rope.items() if value is not None and name not in OF_EVERY_KIND + OF_KIND[kind]]
    if unread:
        told = " ".join(", ".join(unread).split())
        warnings.warn(f"{where}: rope_type={kind!r} has no field {told:.200}, which is not read", stacklevel=2)
    theta = number(rope, "rope_theta", number(data, "rope_theta", 10000.0))
    if kind in ("linear", "dynamic"):
        return theta, RopeScaling(kind, number(rope, "factor"))
    if kind == "default":
        return theta, None
    original = whole(rope, "original_max_position_embeddings", max_context)
    original = whole(data, "original_max_position_embeddings", original)
    return theta, _llama3(rope, original) if kind == "llama3" else _yarn(rope, original, max_context)


def hf_rope_spelling(scaling: RopeScaling) -> dict[str, Any]:
    """The `rope_scaling` of a config.json that hf_rope reads back."""
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


def _stated_rope(data: Mapping[str, Any], where: object) -> Mapping[str, Any]:
    """The one of the two objects that counts; {} where a file has neither."""
    older, newer = data.get("rope_scaling"), data.get("rope_parameters")
    for name, value in (("rope_scaling", older), ("rope_parameters", newer)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r:.80} must be an object")
    if older and newer and older != newer:
        warnings.warn(f"{where}: rope_scaling is read; rope_parameters differs, and is not read", stacklevel=3)
    return older or newer or {}


def _kind(rope: Mapping[str, Any], where: object) -> str:
    """`rope_type`, or `type` in its older spelling."""
    kind, older = rope.get("rope_type"), rope.get("type")
    if kind is not None and older is not None and kind != older:
        warnings.warn(f"{where}: rope_type={kind!r:.80} is read; type={older!r:.80} is not", stacklevel=3)
    kind = older if kind is None else kind
    kind = "default" if kind is None else kind
    if kind not in ("default", *KINDS):
        raise ValueError(f"rope_type={kind!r:.80} is not supported (known: default, {', '.join(KINDS)})")
    return str(kind)


def _refuse_other_rotations(data: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """ValueError for a head that is turned in part, for rows in another order, and for layers that turn differently."""
    part = number(rope, "partial_rotary_factor", number(data, "partial_rotary_factor", 1.0))
    if part != 1:
        raise ValueError(f"partial_rotary_factor={part} is not supported")
    if flag(data, "rope_interleaved"):
        raise ValueError("rope_interleaved=True is not supported")
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(f"the RoPE parameters hold {nested[0]!r:.80}: only one rule for every layer is supported")


def _llama3(rope: Mapping[str, Any], original: int) -> RopeScaling:
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    return RopeScaling("llama3", number(rope, "factor"), low, high, original)


def _yarn(rope: Mapping[str, Any], original: int, max_context: int) -> RopeScaling:
    """A factor of null is by how much the context has grown, as DeepSeek's files mean it."""
    if "factor" not in rope:
        raise ValueError("factor is missing")
    factor = number(rope, "factor", max_context / original)
    return RopeScaling(
        "yarn",
        factor,
        original_context=original,
        beta_fast=number(rope, "beta_fast", 32.0) or 32.0,
        beta_slow=number(rope, "beta_slow", 1.0) or 1.0,
        attention_factor=_attention_factor(rope, factor),
        truncate=flag(rope, "truncate", "truncate" not in rope),  # transformers takes null for false
    )


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    """As stated, or by the two weights that DeepSeek's files state in its place; 0 is as good as absent in these."""
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")
    above, below = number(rope, "mscale", 0.0), number(rope, "mscale_all_dim", 0.0)
    if not (above and below):
        return None
    grown = 0.1 * math.log(max(factor, 1.0))
    if below * grown == -1:
        raise ValueError(f"mscale_all_dim={below} makes the attention factor infinite")
    return (above * grown + 1) / (below * grown + 1)

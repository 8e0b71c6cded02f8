"""RopeScaling from the metadata of a GGUF file and its tensor of factors, as llama.cpp understands them.

Source: github.com/ggml-org/llama.cpp, src/llama-model.cpp and src/llama-context.cpp (October 2026). A file that names no
kind is of the kind "linear"; a factor of 0 is none; the kind "none" scales nothing, whatever else the file states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llama_ref.rope_scaling import RopeScaling

KEY = "llama.rope.scaling."
KINDS = ("none", "linear", "yarn")
EDGE = 1e-5  # of a blend, where float32 cannot tell it from a border
NEUTRAL = {"alpha": (0,), "yarn_ext_factor": (1, -1), "yarn_attn_factor": (1, -1), "yarn_log_multiplier": (0,)}


def gguf_rope_scaling(
    metadata: Mapping[str, Any], theta: float, head_dim: int, factors: Sequence[float] | None
) -> RopeScaling | None:
    """`factors`: the values of `rope_freqs.weight`, if the file has it. ValueError names the field."""
    kind = metadata.get(KEY + "type", "linear")
    if kind not in KINDS:
        raise ValueError(f"{KEY}type={kind!r} is not supported (known: {', '.join(KINDS)})")
    factor = _number(metadata, KEY + "factor", _number(metadata, "llama.rope.scale_linear", 1.0)) or 1.0
    if kind == "none":
        factor = 1.0
    for name, values in NEUTRAL.items():
        if kind != "none" and _number(metadata, KEY + name, values[0]) not in values:
            raise ValueError(f"{KEY}{name}={metadata[KEY + name]} is not supported")
    if kind == "yarn":
        if factors is not None:
            raise ValueError(f"{KEY}type='yarn' together with rope_freqs.weight is not supported")
        return _yarn(metadata, factor)
    if _number(metadata, KEY + "attn_factor", 1.0) not in (0.0, 1.0):
        raise ValueError(f"{KEY}attn_factor={metadata[KEY + 'attn_factor']} is supported for the type 'yarn' alone")
    if factors is None:
        return None if factor == 1.0 else RopeScaling("linear", factor)
    if factor != 1.0:
        raise ValueError(f"{KEY}type={kind!r} together with rope_freqs.weight is not supported")
    return _llama3(metadata, theta, head_dim, factors)


def llama3_rope_factors(scaling: RopeScaling, theta: float, head_dim: int) -> list[float]:
    """By what each of the head_dim / 2 frequencies is divided, as GGUF stores it in `rope_freqs.weight`.

    A fact about a file, used to recognise it; the models derive the angles on their own.
    """
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)  # in positions
        if wavelength < scaling.original_context / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > scaling.original_context / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return factors


def _yarn(metadata: Mapping[str, Any], factor: float) -> RopeScaling:
    """llama.cpp multiplies the attention factor by what YaRN's paper gives, so a file states what is beyond that."""
    if KEY + "factor" not in metadata and "llama.rope.scale_linear" not in metadata:
        raise ValueError(f"{KEY}type='yarn' without {KEY}factor is not supported")
    context = _number(metadata, KEY + "original_context_length", 0.0) or _number(metadata, "llama.context_length", 0.0)
    beyond = _number(metadata, KEY + "attn_factor", 1.0) or 1.0
    return RopeScaling(
        "yarn",
        factor,
        original_context=int(context),
        beta_fast=_number(metadata, KEY + "yarn_beta_fast", 32.0),
        beta_slow=_number(metadata, KEY + "yarn_beta_slow", 1.0),
        attention_factor=None if beyond == 1.0 else beyond * (0.1 * math.log(max(factor, 1.0)) + 1.0),
    )


def _llama3(metadata: Mapping[str, Any], theta: float, head_dim: int, factors: Sequence[float]) -> RopeScaling | None:
    """The rule of Llama 3 whose factors these are: with its published constants, else with those that they show."""
    if len(factors) != head_dim // 2:
        raise ValueError(f"rope_freqs.weight holds {len(factors)} factors for a head dimension of {head_dim}")
    largest = float(max(factors))
    if not all(0 < factor < math.inf for factor in factors) or largest < 1.0:
        raise ValueError("rope_freqs.weight does not follow the llama-3 rule: not supported")
    if largest == min(factors) == 1.0:
        return None
    context = int(_number(metadata, KEY + "original_context_length", 0.0)) or 8192
    for scaling in (RopeScaling("llama3", largest), *_shown(factors, theta, context)):
        expected = llama3_rope_factors(scaling, theta, head_dim)
        if all(abs(found - wanted) <= 1e-4 * wanted for found, wanted in zip(factors, expected)):
            return scaling
    raise ValueError("rope_freqs.weight does not follow the llama-3 rule: not supported")


def _shown(factors: Sequence[float], theta: float, context: int) -> list[RopeScaling]:
    """The constants behind the factors. The blend is linear in the frequency, so two blended pairs give its two borders;
    where fewer are blended, any borders between the pairs on either side give the same angles.

    Only the borders, `context` / constant, show in the factors, not the context itself.
    """
    largest = float(max(factors))
    turns = [context * theta ** (-pair / len(factors)) / (2 * math.pi) for pair in range(len(factors))]
    blends = [
        (1 / factor - 1 / largest) / (1 - 1 / largest) for factor in factors
    ]  # 1: kept, 0: divided by the largest
    blended = [pair for pair, blend in enumerate(blends) if EDGE < blend < 1 - EDGE]
    around = [2 * turns[0], *turns, turns[-1] / 2]
    if len(blended) > 1:
        first, last = blended[0], blended[-1]
        width = (turns[first] - turns[last]) / ((blends[first] - blends[last]) or math.inf)
        low = turns[first] - blends[first] * width
    elif blended:
        (pair,) = blended
        before, here, after = around[pair : pair + 3]
        width = min((here - after) / blends[pair], (before - here) / (1 - blends[pair])) / 2
        low = here - blends[pair] * width
    else:
        kept = sum(blend > 1 / 2 for blend in blends)
        before, after = around[kept : kept + 2]
        low, width = after + (before - after) / 3, (before - after) / 3
    try:
        return [RopeScaling("llama3", largest, low, low + width, context)]
    except ValueError:  # no rule has such borders
        return []


def _number(metadata: Mapping[str, Any], name: str, default: float) -> float:
    value = metadata.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a number")
    return float(value)

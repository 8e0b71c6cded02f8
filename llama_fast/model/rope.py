"""Rotary positions: the angles by which a model turns its queries and keys, as a table of cosines and sines.

A second derivation of the arithmetic of `llama_ref.model`: pairs are turned by real numbers, not by complex ones.
Shapes: B batch, T tokens, h heads, d head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama_ref.config import LlamaConfig, RopeScaling


def rope_table(config: LlamaConfig) -> Tensor:
    """Cosine and sine of every position's angles, float32 [max_context, d/2, 2], from float64 angles.

    Float32 is a must: in bf16 neighbouring positions beyond a few hundred would share an angle. With YaRN both are longer
    than a unit vector's, which sharpens the attention between a rotated q and a rotated k.
    """
    exponent = torch.arange(config.head_dim // 2, dtype=torch.float64) * (2 / config.head_dim)
    frequency = torch.exp(-exponent * math.log(config.rope_theta))
    radius = 1.0
    if config.rope_scaling is not None:
        frequency, radius = stretch(frequency, config.rope_scaling)
    angle = torch.outer(torch.arange(config.max_context, dtype=torch.float64), frequency)
    return torch.stack([angle.cos() * radius, angle.sin() * radius], -1).float()


def stretch(frequency: Tensor, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Frequencies for a longer context, and the length of the rotated vectors.

    "linear" slows every pair by the factor. "llama3" sorts pairs by wavelength: short ones stay, long ones are slowed,
    those between go smoothly from one to the other (Llama 3.1's published rule). "yarn" does so by the pair's place
    between two borders. "dynamic" leaves the trained context as it is, and no model here goes beyond.
    """
    slowed = frequency / scaling.factor
    if scaling.kind == "dynamic":
        return frequency, 1.0
    if scaling.kind == "linear":
        return slowed, 1.0
    if scaling.kind == "yarn":
        share = yarn_slowed(frequency, scaling)
        sharper = scaling.attention_factor or 1 + math.log(scaling.factor) / 10
        return torch.lerp(frequency, slowed, share), sharper
    wavelength = 2 * math.pi / frequency
    longest_kept = scaling.original_context / scaling.high_freq_factor
    shortest_slowed = scaling.original_context / scaling.low_freq_factor
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = torch.lerp(slowed, frequency, smooth)
    long = torch.where(wavelength > shortest_slowed, slowed, between)
    return torch.where(wavelength < longest_kept, frequency, long), 1.0


def yarn_slowed(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """How far each pair is slowed, 0 to 1: a straight line between two borders on the scale of pairs.

    Frequencies fall by a constant ratio from pair to pair, so the (fractional) pair whose wavelength fits n times into
    the original context is found by a logarithm to that ratio.
    """
    pairs = frequency.shape[0]
    log_ratio = math.log(frequency[0] / frequency[1])

    def border(times: float) -> float:
        return math.log(scaling.original_context / (times * 2 * math.pi)) / log_ratio

    low, high = border(scaling.beta_fast), border(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001  # as published: a step instead of a ramp
    return torch.tensor([min(max((pair - low) / (high - low), 0.0), 1.0) for pair in range(pairs)]).to(frequency)


def rotate(x_BThd: Tensor, cos_sin_BTd2: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, a sin + b cos) for each pair of a head, in float32."""
    cos, sin = cos_sin_BTd2[:, :, None, :, 0], cos_sin_BTd2[:, :, None, :, 1]
    a, b = x_BThd.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x_BThd)

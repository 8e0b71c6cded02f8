"""RopeScaling: how rotary frequencies are stretched for contexts longer than those of pre-training, as files state it.

A fact about a file. What follows from it, the angles, each of the two models derives on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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

"""What chooses tokens, as compilers and kernels may see it: no slot of a plan, but a part of every step.

Shapes: B batch, V vocabulary, M rows of logits.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Sampler(Protocol):
    """What chooses a token of each row: a `Sampling` made ready for so many rows on a device."""

    @property
    def greedy(self) -> bool:
        """Whether it takes the largest logit and looks at nothing else."""

    @property
    def code(self) -> tuple[object, ...]:
        """What of it changes the code: two samplers with equal values here run the same compiled graph."""

    def __call__(self, logits_BV: Tensor, position_B: Tensor) -> Tensor:
        """The token [B] that stands at `position_B`."""


class SamplingKernels(Protocol):
    """Kernels that do in one launch each what `engine.sampling` writes as many operators."""

    MOST_VOCABULARY: int
    """The largest vocabulary that `distribution` and `draw` take; `likeliest` takes any."""

    def distribution(self, logits: Tensor, temperature: Tensor, top_k: Tensor | None, min_p: Tensor | None) -> Tensor:
        """The distributions [M, V] from which tokens with these logits are drawn, each row by its own settings [B].

        M is a multiple of B: as many logits of each row, one row after another. Temperature 0 is the largest logit alone, and
        a top_k of 0 keeps everything, as None does for all.
        """

    def draw(self, p: Tensor, uniform: Tensor) -> Tensor:
        """The tokens [M] at which the cumulative sums of p [M, V] pass the uniforms [M]."""

    def likeliest(self, logits: Tensor) -> Tensor:
        """The id of the largest of each row of logits [M, V], the lowest on ties, int64 [M]."""

"""Second moments of a matrix's inputs: all that a text says about which of its errors matter.

An error E of a matrix changes its outputs by E x. On average over the inputs x the square of that is trace(E H E^T), with
H = mean(x x^T).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.1
"""Added to the diagonal, as a share of its mean: what the text did not show may still come. Ten times what GPTQ takes: on text of
another kind than the calibration text's the loss is a tenth smaller with it, on text of its kind the same."""


@dataclass(frozen=True)
class Moments:
    """H [in, in] in float32, the mean over `count` inputs."""

    H: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """The moments of inputs x [..., in]. ValueError if one is not finite."""
        x_NI = x.reshape(-1, x.shape[-1]).float()
        H = x_NI.t() @ x_NI / len(x_NI)
        if not H.isfinite().all():
            raise ValueError(f"inputs of a matrix with {x.shape[-1]} columns overflow or are no numbers on this text")
        return cls(H, len(x_NI))

    @property
    def dead(self) -> Tensor:
        """Which columns no input of the text reaches: bool [in]."""
        return self.H.diagonal() == 0

    def cost(self) -> Tensor:
        """What an error in each column costs by itself, [in]; of a dead one a little, since another text may reach it."""
        diagonal = self.H.diagonal()
        return diagonal + DAMPING * mean_of(diagonal)

    def answers(self) -> tuple[Tensor, float]:
        """(U, damping): the upper triangular U [in, in] with U^T U = H^-1, and what had to be added to H's diagonal for it.

        An error e in column j, divided by U[j, j] and times U[j, j + 1:], is what the later columns change by to answer it; what
        then remains costs e^2 / U[j, j]^2. The damping grows tenfold until H can be inverted in float64, which has an end.
        """
        diagonal = self.H.diagonal()
        damping = DAMPING
        while True:
            damped = self.H.double()
            damped.diagonal().add_(damping * float(mean_of(diagonal)))
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not failed and upper.isfinite().all():
                    return upper.float(), damping
            damping *= 10


def mean_of(diagonal: Tensor) -> Tensor:
    """The mean of a diagonal, 1 where it is zero: of a matrix that no input reaches all errors cost the same."""
    mean = diagonal.mean()
    return torch.where(mean > 0, mean, torch.ones_like(mean))

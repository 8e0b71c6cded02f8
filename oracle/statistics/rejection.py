"""The exact law of what a speculative sampler emits, found from outside: the sampler is a black box on uniforms.

`accept(draft [B, K], q [B, K, V], p [B, K + 1, V], u [B, K + 1]) -> (tokens [B, K + 1], count [B])` is probed on every
sequence of proposals. For given proposals its answer changes only at thresholds of its uniforms; bisection finds them to
the last bit, and their distances are probabilities. What is emitted, continued by the target to K + 1 tokens, must have
the target's joint law. Random uniforms then check that the box has no threshold that was not looked for.

Shapes: V vocabulary, K proposals, R probed rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Accept = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

BITS = 53
MOST = 1 - 2.0**-BITS
"""The largest uniform."""


@dataclass(frozen=True)
class Tables:
    """Conditional laws: `target[i]` and `draft[i]` have shape [V] * (i + 1), the last axis given the i tokens before."""

    target: Sequence[Tensor]  # K + 1 of them
    draft: Sequence[Tensor]  # K

    @property
    def joint(self) -> Tensor:
        """The target's law of K + 1 tokens, [V] * (K + 1)."""
        return continued(torch.ones((), dtype=self.target[0].dtype), self.target)


def continued(law: Tensor, conditionals: Sequence[Tensor]) -> Tensor:
    """A law of some tokens times the conditional laws of those that follow."""
    for conditional in conditionals:
        law = law[..., None] * conditional
    return law


@dataclass(frozen=True)
class Probe:
    """Every sequence of proposals as one row, with the distributions that belong to it."""

    draft_RK: Tensor
    q_RKV: Tensor
    p_RTV: Tensor

    @classmethod
    def of(cls, tables: Tables) -> Probe:
        V, K = tables.target[0].shape[-1], len(tables.draft)
        rows = list(itertools.product(range(V), repeat=K))
        q = [torch.stack([tables.draft[i][row[:i]] for i in range(K)]) for row in rows]
        p = [torch.stack([tables.target[i][row[:i]] for i in range(K + 1)]) for row in rows]
        return cls(torch.tensor(rows).view(len(rows), K), torch.stack(q), torch.stack(p))

    def ask(self, accept: Accept, u_RT: Tensor) -> tuple[Tensor, Tensor]:
        return accept(self.draft_RK, self.q_RKV, self.p_RTV, u_RT)


def bisect(accepts: Callable[[Tensor], Tensor], rows: int) -> Tensor:
    """The measure of the u in [0, 1) that `accepts` says yes to, if these are all below some threshold."""
    low, high = torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
    for _ in range(BITS + 2):
        middle = (low + high) / 2
        yes = accepts(middle.clamp(max=MOST))
        low, high = torch.where(yes, middle, low), torch.where(yes, high, middle)
    return high


def emitted_law(accept: Accept, tables: Tables, checks: int = 64) -> Tensor:
    """The law of the first K + 1 tokens, [V] * (K + 1), float64. ValueError where the box has no such thresholds."""
    probe = Probe.of(tables)
    (R, K), V = probe.draft_RK.shape, tables.target[0].shape[-1]

    def uniforms(stand: int, last: Tensor) -> Tensor:
        """The first `stand` proposals stand if they ever can, the next falls if it ever can."""
        u_RT = torch.full((R, K + 1), MOST, dtype=torch.float64)
        u_RT[:, :stand] = 0.0
        u_RT[:, K] = last
        return u_RT

    stands_RK = torch.zeros(R, K, dtype=torch.float64)
    for i in range(K):

        def stands(u_R: Tensor, i: int = i) -> Tensor:
            u_RT = uniforms(i, torch.tensor(0.5))
            u_RT[:, i] = u_R
            return probe.ask(accept, u_RT)[1] > i + 1

        stands_RK[:, i] = bisect(stands, R)
    bounds_RTV = torch.ones(R, K + 1, V, dtype=torch.float64)  # of the token after n proposals: P(token <= v)
    for n, v in itertools.product(range(K + 1), range(V - 1)):

        def at_most(u_R: Tensor, n: int = n, v: int = v) -> Tensor:
            return probe.ask(accept, uniforms(n, u_R))[0][:, n] <= v

        bounds_RTV[:, n, v] = bisect(at_most, R)
    _check(accept, probe, stands_RK, bounds_RTV, checks)
    return _law(tables, probe, stands_RK, bounds_RTV)


def _check(accept: Accept, probe: Probe, stands_RK: Tensor, bounds_RTV: Tensor, checks: int) -> None:
    """The thresholds must foretell the box's answer to random uniforms, away from the thresholds themselves."""
    R, K = probe.draft_RK.shape
    generator = torch.Generator().manual_seed(0)
    for _ in range(checks):
        u_RT = torch.rand(R, K + 1, dtype=torch.float64, generator=generator)
        n_R = (u_RT[:, :K] < stands_RK).long().cumprod(-1).sum(-1)
        last_R = (bounds_RTV[torch.arange(R), n_R] <= u_RT[:, K:]).sum(-1)
        tokens_RT, count_R = probe.ask(accept, u_RT)
        right_R = (count_R == n_R + 1) & (tokens_RT.gather(1, n_R[:, None])[:, 0] == last_R)
        place_K = torch.arange(K)
        kept_RK = (tokens_RT[:, :K] == probe.draft_RK) | (place_K >= n_R[:, None])
        possible_R = (probe.q_RKV.gather(-1, probe.draft_RK[..., None])[..., 0] > 0).all(-1)
        if not (right_R & kept_RK.all(-1))[possible_R].all():
            raise ValueError("the sampler's answer does not follow from one threshold per uniform")


def _law(tables: Tables, probe: Probe, stands_RK: Tensor, bounds_RTV: Tensor) -> Tensor:
    (R, K), V = probe.draft_RK.shape, tables.target[0].shape[-1]
    proposed = continued(torch.ones((), dtype=torch.float64), [table.double() for table in tables.draft]).reshape(R)
    last_RTV = bounds_RTV.diff(dim=-1, prepend=torch.zeros(R, K + 1, 1, dtype=torch.float64))
    target = [table.double() for table in tables.target]
    law = torch.zeros([V] * (K + 1), dtype=torch.float64)
    for n in range(K + 1):
        falls = 1 - stands_RK[:, n] if n < K else 1.0
        weight_R = proposed * stands_RK[:, :n].prod(-1) * falls
        seen = (weight_R[:, None] * last_RTV[:, n]).view(V**n, V ** (K - n), V).sum(1).view([V] * (n + 1))
        law += continued(seen, target[n + 1 :])
    return law


def worst_error(accept: Accept, tables: Tables) -> float:
    """The largest difference between the law of what is emitted and the target's; infinite where there is no law."""
    try:
        error = (emitted_law(accept, tables) - tables.joint.double()).abs().max()
    except ValueError:
        return math.inf
    return float(error)

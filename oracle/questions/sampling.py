"""Sampling on trial by itself: given logits, the distribution and the draws from it.

The distribution is compared with one worked out here in float64 by sorting, at every setting; the cuts of top-k and
top-p fall between numbers that are well apart, so that rounding cannot move them. Draws are compared with the
distribution by chi-square at a false-alarm rate of one in a million, over seeds, over positions, and over pairs of
neighbouring positions and seeds, which must not know each other.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from oracle.questions.generation import chi_square, distribution, shows
from oracle.statistics.compare import Check, Verdict
from oracle.subjects.subject import Setting

V = 61
ROUNDING = 2e-6  # a float32 softmax of logits up to 30: 32 units of roundoff
SETTINGS = (
    Setting(),
    Setting(0.5),
    Setting(1.7),
    Setting(1.0, top_k=1),
    Setting(0.8, top_k=7),
    Setting(1.0, top_k=V),
    Setting(1.0, top_k=10 * V),
    Setting(1.0, top_p=0.05),
    Setting(1.2, top_p=0.62),
    Setting(0.9, top_k=12, top_p=0.71),
    Setting(1.0, min_p=0.13),
    Setting(1.2, top_k=30, top_p=0.9, min_p=0.41),
)
WIDE = 601
WIDE_SETTINGS = (
    Setting(0.02),
    Setting(5.0),
    Setting(1.0, top_k=100),
    Setting(1.0, top_k=WIDE - 1),
    Setting(1.0, top_p=0.999),
)
DRAWS = 4096
LARGE = 1 << 17


class Sampler(Protocol):
    """What is judged: a chooser of tokens from logits [B, V], each row with its own seed and position."""

    def probabilities(self, logits_BV: Tensor, setting: Setting) -> Tensor:
        """[B, V]."""

    def several(self, logits_BTV: Tensor, settings: Sequence[Setting]) -> Tensor:
        """[B, T, V]: of several positions of each row, by a setting of its own."""

    def draw(self, logits_BV: Tensor, setting: Setting, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Token ids [B]; temperature 0 is the argmax."""


def judge_sampling(sampler: Sampler, device: torch.device) -> Verdict:
    """Distributions at every setting, the argmax at temperature 0, draws by frequency and by independence."""
    narrow_BV, wide_BV = _logits().to(device), _wide_logits().to(device)
    asked = [(setting, narrow_BV) for setting in SETTINGS] + [(setting, wide_BV) for setting in WIDE_SETTINGS]
    worst, where = 0.0, ""
    for setting, logits_BV in asked:
        found = sampler.probabilities(logits_BV.clone(), setting).double().cpu()
        error = (found - distribution(logits_BV, setting)).abs().nan_to_num(nan=math.inf)
        if float(error.max()) > worst:
            row, token = divmod(int(error.argmax()), logits_BV.shape[1])
            worst, where = float(error.max()), f"{setting}: row {row}, token {token}"
    numbers = sum(logits_BV.numel() for _, logits_BV in asked)
    checks = [Check("largest error of a probability", worst, ROUNDING, where, numbers), _fineness(sampler, device)]
    checks.append(_several(sampler, narrow_BV))
    return Verdict((*checks, _greedy(sampler, device), *_draws(sampler, device), *_rows(sampler, device)))


def _several(sampler: Sampler, logits_BV: Tensor) -> Check:
    """Three positions of every row at once, where rows are told unlike things: each as it would be alone. At temperature 0 all
    weight is the likeliest token's."""
    unlike = (*SETTINGS, Setting(0.0), Setting(0.0, top_k=3))
    worst, where = 0.0, ""
    for first in range(len(unlike)):
        settings = [unlike[(first + 3 * row) % len(unlike)] for row in range(len(logits_BV))]
        logits_BTV = torch.stack([logits_BV.roll(shift, -1) for shift in (0, 7, 20)], 1)
        found_BTV = sampler.several(logits_BTV.clone(), settings).double().cpu()
        for row, (setting, logits_TV) in enumerate(zip(settings, logits_BTV, strict=True)):
            wanted_TV = distribution(logits_TV, setting if setting.temperature else Setting(1.0, top_k=1))
            error = float((found_BTV[row] - wanted_TV).abs().nan_to_num(nan=math.inf).max())
            if error > worst:
                worst, where = error, f"row {row} of {len(settings)}: {setting}"
    count = len(unlike) * logits_BV.numel() * 3
    return Check("largest error of a probability, several positions of unlike rows", worst, ROUNDING, where, count)


def _wide_logits() -> Tensor:
    """Two rows of many distinct logits in a shuffled order, so gentle that the coldest setting keeps its digits."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([-step * torch.randperm(WIDE, generator=generator) for step in (0.001, 0.0007)])


def _fineness(sampler: Sampler, device: torch.device) -> Check:
    """Of 2^17 equally likely tokens as many odd ones as even ones come: a coarser number would draw every second, or fewer."""
    rows, steps = 32, 8
    level_BV = torch.zeros(rows, LARGE, device=device)
    odd = sum(
        int((sampler.draw(level_BV, Setting(), list(range(rows)), [step] * rows) % 2).sum()) for step in range(steps)
    )
    return chi_square("parity of many tokens", [odd, rows * steps - odd], [rows * steps / 2] * 2, 1)


def _logits() -> Tensor:
    """Rows of distinct logits in a shuffled order: gentle, steep, one far ahead, with impossible tokens, shifted."""
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack([torch.randperm(V, generator=generator) for _ in range(5)])
    steps = torch.tensor([0.05, 0.4, 0.11, 0.07, 0.023])[:, None]
    logits = -steps * shuffled
    logits[2, int(shuffled[2].argmin())] += 9.0
    logits[3, shuffled[3] >= V - 20] = -math.inf
    logits[4] += 30.0
    return logits


def _greedy(sampler: Sampler, device: torch.device) -> Check:
    """The largest logit; of equal ones the lowest id; also where all are negative, huge, or but one impossible."""
    rows = torch.zeros(5, V)
    rows[0, 17] = 1e-3
    rows[1, [40, 9, 60]] = 5.0
    rows[2] = -1e4
    rows[2, V - 1] = -9999.0
    rows[3] = -math.inf
    rows[3, 0] = -50.0
    rows[4, 33], rows[4, 34] = 1e30, 1e31
    found = sampler.draw(rows.to(device), Setting(0.0), [0, 1, 2, 3, 4], [5] * 5).tolist()
    wanted = [17, 9, V - 1, 0, 34]
    wrong = [f"row {i}: {a} instead of {b}" for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
    return Check("rows whose argmax is another", len(wrong), 0, wrong[0] if wrong else "", len(wanted))


def _draws(sampler: Sampler, device: torch.device) -> list[Check]:
    """Frequencies over seeds at one position and over positions at one seed; pairs of neighbours."""
    cells = 4
    base_V = 2 * _logits()[0]  # so steep that another temperature shows
    setting = Setting(1.1, top_k=40, top_p=0.93)
    p_V = distribution(base_V[None], setting)[0]
    edges_V = (p_V.cumsum(0) * cells).clamp(max=cells - 1e-9).long()  # tokens gathered into cells of nearby chance
    chance = torch.zeros(cells, dtype=torch.float64).scatter_add(0, edges_V, p_V)
    logits_BV = base_V[None].expand(DRAWS, V).contiguous().to(device)
    ways = {"seeds": (list(range(DRAWS)), [7] * DRAWS), "positions": ([3] * DRAWS, list(range(DRAWS)))}
    checks = []
    for name, (seeds, positions) in ways.items():
        tokens_B = sampler.draw(logits_BV, setting, seeds, positions).cpu()
        counts = torch.bincount(tokens_B.clamp(0, V - 1), minlength=V).double()
        kept = p_V > 0
        impossible = int(counts[~kept].sum())
        checks.append(Check(f"draws of probability 0 over {name}", impossible, 0, "", DRAWS))
        freedom = int(kept.sum()) - 1
        expected = (p_V[kept] * DRAWS).tolist()
        checks.append(chi_square(f"draws over {name}", counts[kept].tolist(), expected, freedom))
        cell = edges_V[tokens_B.clamp(0, V - 1)]
        pairs = torch.bincount(cell[::2] * cells + cell[1::2], minlength=cells**2).double()
        both = (torch.outer(chance, chance).flatten() * (DRAWS // 2)).tolist()
        hotter = distribution(base_V[None], replace(setting, temperature=1.5))[0][kept] * DRAWS
        twins = torch.diag(chance).flatten() * (DRAWS // 2)
        for planted, wanted, free in ((hotter, expected, freedom), (twins, both, cells**2 - 1)):
            if not shows(planted.tolist(), wanted, free):
                return [
                    Check(f"draws over {name}", 0, 0, "too few to tell another temperature, or a number used twice", 0)
                ]
        checks.append(chi_square(f"neighbouring {name}", pairs.tolist(), both, cells**2 - 1))
    return checks


def _rows(sampler: Sampler, device: torch.device) -> list[Check]:
    """A row draws the same alone, in a batch, and again; large seeds and positions count in full."""
    logits_BV = _logits()[:4].to(device)
    seeds, positions, setting = [11, 12, 2**32 + 11, 2**63], [3, 900, 3, 70000], Setting(1.3)
    together = [sampler.draw(logits_BV, setting, seeds, [at + k for at in positions]).tolist() for k in range(16)]
    again = [sampler.draw(logits_BV, setting, seeds, [at + k for at in positions]).tolist() for k in range(16)]
    alone = [
        [int(sampler.draw(logits_BV[b : b + 1], setting, seeds[b : b + 1], [positions[b] + k])[0]) for b in range(4)]
        for k in range(16)
    ]
    same_V = logits_BV[:1].expand(2, V).contiguous()
    twins = [sampler.draw(same_V, setting, [11, 2**32 + 11], [3 + k] * 2).tolist() for k in range(16)]
    unlike = sum(a != b for a, b in zip(together, again, strict=True))
    mixed = sum(a != b for a, b in zip(together, alone, strict=True))
    return [
        Check("steps that differ when drawn again", unlike, 0, "", 16),
        Check("steps that differ alone and in a batch", mixed, 0, "", 16),
        Check("seeds 11 and 2^32 + 11 draw alike", float(all(a == b for a, b in twins)), 0, "", 16),
    ]

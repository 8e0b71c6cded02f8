"""Streams of random numbers on trial, through the library's face: a row's draws over its own tokens, rows beside each
other, calls.

After the marker D of a walker (oracle.subjects.walkers) two tokens are likely, by 3 to 1, at every place and whatever came
before. So whether the likelier one came is a coin of known chance, and two draws that are independent fill the four cells
of (this one, that one) by the products of their chances: chi-square, one false alarm in a million for each pair of places.
Who uses a number twice fills two of the cells. What seeds promise exactly (row b draws with seed + b, alone or among
others) is compared exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_fast.llama import Llama
from oracle.questions.face import Faces, ids_of
from oracle.questions.generation import chi_square
from oracle.questions.tally import Tally
from oracle.statistics.compare import Check, Verdict, empty
from oracle.subjects.walkers import following

ROWS, NEW = 64, 32
PROMPT = "D: draw"
LAGS = (1, 2, 3, 4, 8, 16)
BESIDE = (1, 2, 3)
SEED, FAR = 1000, 50_000


def judge_seeds(faces: Faces) -> Verdict:
    """Chances, independence within a row, across rows and across calls; and that a seed says all."""
    llama, logits_V = faces.llama(), faces.truth().prefill_logits([ids_of(PROMPT)])[0][-1]
    p = float(logits_V.softmax(-1).max())
    first, other = likelier(llama, SEED), likelier(llama, FAR)
    heads = int(first.sum()) + int(other.sum())
    total = first.numel() + other.numel()
    chance = chi_square("chance of the likelier token", [heads, total - heads], [p * total, (1 - p) * total], 1)
    within = [(f"tokens {lag} apart", first[:, :-lag], first[:, lag:]) for lag in LAGS]
    across = [
        (f"rows {down} apart, tokens {lag}", *shifted(first, down, lag)) for down in BESIDE for lag in (-2, -1, 0, 1, 2)
    ]
    if worst_pair("one number for two draws", [("twins", first, first)], p).ok:
        return empty("seeds", f"so few draws of chance {p:.3f} do not tell that one number serves two of them")
    calls = [(f"calls, tokens {lag} apart", *beside(first, other, lag)) for lag in (-1, 0, 1)]
    return Verdict(
        (
            chance,
            worst_pair("a row's own draws", within, p),
            worst_pair("draws of rows beside each other", across, p),
            worst_pair("draws of calls with other seeds", calls, p),
            _promises(llama).check("seeds"),
        )
    )


def likelier(llama: Llama, seed: int) -> Tensor:
    """Whether each of NEW tokens of ROWS equal prompts is the likelier one, bool [ROWS, NEW]."""
    outs = llama.generate([PROMPT] * ROWS, NEW, temperature=1.0, seed=seed)
    rows = []
    for out in outs:
        before = [ids_of(PROMPT)[-1], *out.tokens[:-1]]
        rows.append([token == following(3, last) for token, last in zip(out.tokens, before, strict=True)])
    return torch.tensor(rows)


def shifted(draws: Tensor, down: int, lag: int) -> tuple[Tensor, Tensor]:
    """Each draw that has one `down` rows below and `lag` tokens later, and that one."""
    return beside(draws[:-down], draws[down:], lag)


def beside(one: Tensor, other: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Draws of one table, and those `lag` tokens later in another."""
    if lag < 0:
        return one[:, -lag:], other[:, :lag]
    return (one[:, :-lag], other[:, lag:]) if lag else (one, other)


def worst_pair(name: str, pairs: list[tuple[str, Tensor, Tensor]], p: float) -> Check:
    """The pair of places whose draws know most of each other."""
    checks = []
    for where, one, other in pairs:
        cell = 2 * one.flatten().long() + other.flatten().long()
        counts = torch.bincount(cell, minlength=4).tolist()
        expected = [a * b * len(cell) for a in (1 - p, p) for b in (1 - p, p)]
        found = chi_square(name, counts, expected, 3)
        checks.append(Check(name, found.measured, found.budget, where, found.compared))
    return max(checks, key=lambda check: check.measured / max(check.budget, 1e-9))


def _promises(llama: Llama) -> Tally:
    """Row b draws with seed + b, as it does alone, among others, in another order, again, and as a sample of its own."""
    tally, rows = Tally("rows"), 5

    def drawn(count: int, seed: int | list[int]) -> list[list[int]]:
        return [out.tokens for out in llama.generate([PROMPT] * count, NEW, temperature=1.0, seed=seed)]

    together = drawn(rows, SEED)
    tally.see("again", drawn(rows, SEED), together, rows)
    tally.see("from the next seed on", drawn(rows - 1, SEED + 1), together[1:], rows - 1)
    tally.see("samples one by one", [drawn(1, SEED + b)[0] for b in range(rows)], together, rows)
    turned = [SEED + b for b in reversed(range(rows))]
    tally.see("seeds in another order", drawn(rows, turned), together[::-1], rows)
    streamed = "".join(llama.stream(PROMPT, NEW, temperature=1.0, seed=SEED + 2))
    tally.see("streamed", streamed, llama.decode(together[2]))
    distant = drawn(4, [SEED, SEED + 2**32, SEED + 2**63, 0])
    tally.see("distinct seeds that draw alike", len({*map(tuple, distant)}), 4, 4)
    tally.see("the last seed and the first", len({*map(tuple, drawn(2, 2**64 - 1))}), 2)
    return tally

"""The generation loop on trial: where it stops, and whether what it draws is distributed as it says.

Stop rules are exact. Draws are judged by what they leave behind: the tokens and the logits that each came from. A draw
of token t from cumulative probabilities F lies somewhere in [F(t-1), F(t)); a point taken uniformly inside (by a fixed
hash, so that the check is the same at every run) is uniform on [0, 1) if and only if the token follows its distribution,
whatever that is at each step. So one chi-square over all steps of all rows, and one over neighbouring steps (a position
used twice repeats a draw), judge every step of the loop. Both have a false-alarm rate of one in a million.

Shapes: n new tokens, V vocabulary, B rows.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from oracle.statistics.compare import Check, Verdict, empty
from oracle.statistics.greedy import not_as_asked
from oracle.subjects.subject import Generates, Setting

FALSE_ALARM = 1e-6
CELLS = 10
WARM = Setting(3.0)  # so warm that a text does not come twice by chance
SETTINGS = (Setting(), Setting(0.7, top_k=20), Setting(1.3, top_p=0.9), Setting(0.9, top_k=50, top_p=0.8))


def judge_stopping(subject: Generates, prompts: Sequence[Sequence[int]], n: int, quick: bool = False) -> Verdict:
    """Each row ends with its first end id, which it keeps, or after n tokens; rows do not end each other.

    What a row says without end ids is what it must say up to one. Tried are ids that end the first row at its first tokens,
    in its middle, at its last ones; two ids at once; and one that never comes. `quick`: a few of these, of a model that says
    one id over and over too, where walkers (oracle.questions.face) prove the rest.
    """
    if not prompts or n < 1:
        return empty("stop rules", "no prompts")
    free = [tokens for tokens, _ in subject.until(prompts, n, ())]
    short = abs(len(free) - len(prompts)) + sum(len(tokens) != n for tokens in free)
    told = not_as_asked(free, len(prompts), n)
    whole = Check("rows without end ids that are not as long as asked", short, 0, told, len(prompts))
    if not whole.ok:
        return Verdict((whole,))
    said = {token for tokens in free for token in tokens}
    never = next(token for token in itertools.count() if token not in said)
    middle = free[0][len(free[0]) // 2]
    edges = [(token,) for token in ((free[0][0], free[0][-1]) if quick else (*free[0][:3], *free[0][-3:]))]
    sets = [*edges, *([] if quick else [(middle,)]), (free[-1][-1], middle), (never,)]
    wrong, where, compared, amid = 0, "", 0, 0
    for ids in dict.fromkeys(sets):
        ended = subject.until(prompts, n, ids)
        if len(ended) != len(free):
            return Verdict((whole, Check("rows that end elsewhere", 1, 0, f"{len(ended)} rows, asked {len(free)}")))
        for row, ((tokens, reason), unended) in enumerate(zip(ended, free, strict=True)):
            end = next((i for i, token in enumerate(unended) if token in ids), None)
            wanted = (unended, "length") if end is None else (unended[: end + 1], "stop")
            compared += 1
            amid += end is not None and 0 < end < n - 1
            if (tokens, reason) != wanted:
                wrong += 1
                told = f"row {row}, ends {list(ids)}: {len(tokens)} tokens, {reason!r}"
                where = where or f"{told} instead of {len(wanted[0])}, {wanted[1]!r}"
    if not (wrong or amid or quick):
        return empty("rows that end elsewhere", "no row ends amid its text: it is one id over and over")
    return Verdict((whole, Check("rows that end elsewhere", wrong, 0, where, compared)))


def judge_draws(
    subject: Generates, prompts: Sequence[Sequence[int]], n: int, runs: int = 4, copies: int = 1
) -> Verdict:
    """Tokens drawn by the loop against the logits they came from, and the loop against itself with the same seed.

    `copies`: each prompt stands in a batch so many times, so that fewer runs draw as much. A loop that always takes the likeliest
    token, and one that uses a number for two tokens, are tried on the same logits: where these do not show, the question is
    EMPTY; of a few `runs` of a large model only the first is asked.
    """
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    if not prompts or n < 2:
        return empty("draws", "no prompts")
    points: list[list[float]] = []
    ranked: list[float] = []  # the same with tokens in the order of their probability: a wrong temperature gathers them
    likeliest: list[float] = []  # what `ranked` would be of a loop that draws nothing
    impossible, drawn, where = 0, 0, ""
    first: list[tuple[list[int], Tensor]] = []
    for run in range(runs):
        setting = SETTINGS[run % len(SETTINGS)]
        done = subject.sample(prompts, n, setting, seed=1000 + 10 * run)
        first = first or done
        for row, (tokens, logits) in enumerate(done):
            p_nV = distribution(logits, setting)
            inside = random.Random(1000 * run + row)
            points.append([])
            for step, token in enumerate(tokens):
                below, p = float(p_nV[step, :token].sum()), float(p_nV[step, token])
                drawn += 1
                if not p > 0:
                    impossible += 1
                    where = where or f"{setting}: row {row}, token {step} has probability 0"
                    continue
                share = inside.random()
                likelier = float(p_nV[step][p_nV[step] > p].sum())
                likeliest.append(float(p_nV[step].max()) * share)
                points[-1].append(min(below + p * share, 1 - 1e-12))
                ranked.append(min(likelier + p * share, 1 - 1e-12))
    again = subject.sample(prompts, n, SETTINGS[0], seed=1000)
    unlike = sum(a[0] != b[0] for a, b in zip(first, again, strict=True))
    few = runs < len(SETTINGS)  # of a large model; what follows is asked of a tiny one
    drawn_well = [
        Check("drawn tokens of probability 0", impossible, 0, where, drawn),
        uniform_check("distribution of draws", ranked),
        uniform_check("draws by id", [p for row in points for p in row]),
        Check("rows that differ with the same seed", unlike, 0, "", len(prompts)),
    ]
    if not impossible and uniform_check("planted", likeliest).ok:
        return empty("draws", f"{drawn} draws do not tell a loop that takes the likeliest token")
    if few:
        return Verdict(tuple(drawn_well))
    for name, rows in (("neighbouring draws", points), ("neighbouring draws, one later", [row[1:] for row in points])):
        drawn_well.append(pairs_check(name, rows))
        if pairs_check("planted", [[p for p in row[::2] for _ in range(2)] for row in rows]).ok:
            return empty(name, f"{drawn} draws do not tell that one number serves two tokens")
    twins = [tokens for tokens, _ in subject.sample([prompts[0]] * max(2, len(prompts)), n, WARM, seed=40)]
    alike = len(twins) - len({tuple(tokens) for tokens in twins})
    other = subject.sample(prompts, n, SETTINGS[0], seed=6 + len(prompts))
    same = sum(a[0] == b[0] for a, b in zip(first, other, strict=True))
    return Verdict(
        (
            *drawn_well,
            Check("rows that stay with another seed", same, 0, "", len(prompts)),
            Check("equal prompts that draw alike in one batch", alike, 0, "", len(twins)),
        )
    )


def distribution(logits_nV: Tensor, setting: Setting) -> Tensor:
    """What tokens are drawn from, float64 [n, V]: by sorting, the likeliest first, equal logits by id."""
    scaled_nV = logits_nV.double().cpu() / setting.temperature
    order_nV = scaled_nV.argsort(dim=-1, descending=True, stable=True)
    ranked_nV = scaled_nV.gather(-1, order_nV)
    if setting.top_k is not None and setting.top_k < ranked_nV.shape[-1]:
        least_n1 = ranked_nV[:, setting.top_k - 1 : setting.top_k]
        ranked_nV = torch.where(ranked_nV >= least_n1, ranked_nV, -math.inf)
    p_nV = (ranked_nV - ranked_nV[:, :1]).exp()
    p_nV = p_nV / p_nV.sum(-1, keepdim=True)
    if setting.top_p < 1:
        before_nV = p_nV.cumsum(-1) - p_nV
        p_nV = torch.where(before_nV < setting.top_p, p_nV, 0.0)
        p_nV = p_nV / p_nV.sum(-1, keepdim=True)
    if setting.min_p > 0:
        p_nV = torch.where(p_nV >= setting.min_p * p_nV[:, :1], p_nV, 0.0)
        p_nV = p_nV / p_nV.sum(-1, keepdim=True)
    return torch.zeros_like(p_nV).scatter(-1, order_nV, p_nV)


def uniform_check(name: str, points: Sequence[float]) -> Check:
    """Chi-square of points on [0, 1) in equal cells, at least five expected in each."""
    cells = max(2, min(CELLS, len(points) // 5))
    counts = [0] * cells
    for point in points:
        counts[int(point * cells)] += 1
    return chi_square(name, counts, [len(points) / cells] * cells, cells - 1)


def pairs_check(name: str, rows: Sequence[Sequence[float]], cells: int = 3) -> Check:
    """Chi-square of (this draw, the next) over cells x cells: independent draws fill them evenly."""
    counts = [0] * cells**2
    for row in rows:
        for a, b in zip(row[::2], row[1::2]):  # pairs that share no draw
            counts[int(a * cells) * cells + int(b * cells)] += 1
    total = sum(counts)
    return chi_square(name, counts, [total / cells**2] * cells**2, cells**2 - 1)


def shows(planted: Sequence[float], expected: Sequence[float], freedom: int) -> bool:
    """Whether draws by another law exceed the limit on average. It would count `planted`, to which chance adds `freedom`."""
    found = chi_square("planted", planted, expected, freedom)
    return found.measured + freedom > found.budget


def chi_square(name: str, counts: Sequence[float], expected: Sequence[float], freedom: int) -> Check:
    """A Check of the statistic against the value that chance exceeds once in a million (Wilson and Hilferty's cube)."""
    total = int(sum(counts))
    if not total:
        return Check(name, 0.0, 0.0, "nothing was drawn", compared=0)
    found = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
    z = 4.7534  # P(normal > z) = 1e-6
    limit = freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3
    return Check(name, found, limit * 1.15, f"{total} draws", total)  # the cube is 1% short there; few draws are lumpy

"""End to end: the joint law of the first three sampled tokens is the target's, with a stated false-alarm rate and power.

Pearson's chi square over all V^3 sequences, rows with random streams of their own. With n samples a law that differs by total
variation t has noncentrality at least 4 n t^2 (Cauchy-Schwarz: sum d^2 / p >= (sum |d|)^2 = (2 t)^2), so n follows from the
critical value of the false-alarm rate and the power that is asked for.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import BatchSampler, Sampling
from llama_fast.plan import Plan
from llama_fast.speculative import verification as checks
from llama_fast.speculative.proposers import Draft, Ngram, Proposer
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig

FALSE_ALARM, POWER = 1e-6, 0.99
PROMPT = [1, 3, 0, 2, 1, 3]
ROWS = 8192


def beyond(x: float, degrees: int) -> float:
    """P(chi square > x)."""
    return float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(x / 2).double()))


def power(n: int, shift: float, degrees: int, critical: float) -> float:
    """P(noncentral chi square > critical) as a Poisson mixture of central ones."""
    half = 2 * n * shift**2
    j = torch.arange(max(0, int(half - 12 * math.sqrt(half))), int(half + 12 * math.sqrt(half)) + 20).double()
    weight = torch.exp(j * math.log(half) - half - torch.lgamma(j + 1))
    return float((weight * torch.special.gammaincc(degrees / 2 + j, torch.full_like(j, critical / 2))).sum())


def size_of_test(cells: int, shift: float) -> tuple[int, float]:
    """(samples, critical value) for a shift in total variation: (512, 0.02) -> about 1.7e5."""
    degrees = cells - 1
    low, high = float(degrees), 10.0 * degrees + 200
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle, degrees) < FALSE_ALARM else (middle, high)
    few, many = 1, 10**8
    while many - few > 1:
        middle_n = (few + many) // 2
        few, many = (few, middle_n) if power(middle_n, shift, degrees, high) >= POWER else (middle_n, many)
    return many, high


def tiny(V: int, layers: int, seed: int, encoding: Dense | Int8 = Dense()) -> Runner:
    config = LlamaConfig(
        dim=16, n_layers=layers, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=24, vocab_size=V, max_context=32
    )
    return build(random_checkpoint(config, seed), Plan(encoding, cache=Static(multiple=16)), "cpu")


def joint_law(target: Runner, sampling: Sampling) -> Tensor:
    """The exact law [V^3] of the three tokens after the prompt, by whole sequences."""
    V = target.config.vocab_size
    choose = BatchSampler(sampling, [0], target.device)
    pairs = [[*PROMPT, a, b] for a in range(V) for b in range(V)]
    logits_RTV = target.score(torch.tensor(pairs))
    p = [choose.probabilities(logits_RTV[:, len(PROMPT) - 1 + i]).double() for i in range(3)]
    first, second = p[0][0], p[1].view(V, V, V)[:, 0]
    law = first[:, None, None] * second[:, :, None] * p[2].view(V, V, V)
    return (law / law.sum()).reshape(-1)


def counted(target: Runner, draft: Proposer, sampling: Sampling, n: int) -> Tensor:
    """How often each sequence of three came, of n rows with seeds of their own."""
    V = target.config.vocab_size
    counts = torch.zeros(V**3, dtype=torch.float64)
    done = 0
    while done < n:
        rows = min(ROWS, n - done)
        seeded = dataclasses.replace(sampling, seed=sampling.seed + done)
        out = generate(target, [PROMPT] * rows, 3, seeded, draft=draft).completions
        code = torch.tensor([row.tokens for row in out]) @ torch.tensor([V * V, V, 1])
        counts += torch.bincount(code, minlength=V**3)
        done += rows
    return counts


def chi_square(counts: Tensor, law: Tensor) -> float:
    expected = law * counts.sum()
    possible = law > 0
    assert counts[~possible].sum() == 0, "a sequence of probability 0 came"
    assert float(expected[possible].min()) >= 20, "a cell expects too few for the chi square"
    return float(((counts - expected) ** 2 / expected)[possible].sum())


def test_the_size_is_the_one_that_the_law_asks_for() -> None:
    n, critical = size_of_test(512, 0.02)
    assert 1.6e5 < n < 1.8e5 and beyond(critical, 511) == pytest.approx(FALSE_ALARM, rel=1e-3)
    assert power(n - 2000, 0.02, 511, critical) < POWER <= power(n, 0.02, 511, critical)


@pytest.mark.parametrize("name", ["int8", "other", "ngram"])
def test_the_law_of_the_first_three_tokens(name: str) -> None:
    """Sampled: 4 tokens of vocabulary, power against a shift of 4%."""
    target, sampling = tiny(4, 2, 1), Sampling(temperature=1.5, seed=1000)
    draft = {"int8": Draft(tiny(4, 2, 1, Int8()), 2), "other": Draft(tiny(4, 1, 5), 2), "ngram": Ngram(2, shortest=1)}
    n, critical = size_of_test(64, 0.04)
    assert chi_square(counted(target, draft[name], sampling, n), joint_law(target, sampling)) < critical


def test_the_same_transforms_on_both_sides() -> None:
    """Top-k makes sequences impossible: none may come, and the rest keeps its law."""
    target, sampling = tiny(4, 2, 1), Sampling(temperature=1.5, top_k=3, seed=77)
    law = joint_law(target, sampling)
    cells = int((law > 0).sum())
    assert cells == 27
    n, critical = size_of_test(cells, 0.04)
    assert chi_square(counted(target, Draft(tiny(4, 1, 5), 2), sampling, n), law) < critical


def test_a_defect_of_the_rounds_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft's law taken at a higher temperature than it drew with: q is not what it says."""
    target, sampling = tiny(4, 2, 1), Sampling(temperature=1.5, seed=1000)
    accept = checks.accept

    def flattened(draft_BK: Tensor, q_BKV: Tensor, p_BTV: Tensor, u_BT: Tensor) -> tuple[Tensor, Tensor]:
        return accept(draft_BK, q_BKV.sqrt() / q_BKV.sqrt().sum(-1, keepdim=True), p_BTV, u_BT)

    monkeypatch.setattr(checks, "accept", flattened)
    n, critical = size_of_test(64, 0.04)
    assert chi_square(counted(target, Draft(tiny(4, 1, 5), 2), sampling, n), joint_law(target, sampling)) > critical


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["int8", "other", "ngram"])
def test_the_law_of_the_first_three_tokens_of_eight(name: str) -> None:
    """All of it: 8 tokens of vocabulary, power against a shift of 2%."""
    target, sampling = tiny(8, 2, 3), Sampling(temperature=2.0, seed=5 * 10**6)
    draft = {"int8": Draft(tiny(8, 2, 3, Int8()), 2), "other": Draft(tiny(8, 1, 5), 2), "ngram": Ngram(2, shortest=1)}
    law = joint_law(target, sampling)
    n, critical = size_of_test(512, 0.02)
    counts = counted(target, draft[name], sampling, n)
    chi = chi_square(counts, law)
    off = float((counts / n - law).abs().sum() / 2)
    print(
        f"{name}: n={n}, least expected {float(law.min()) * n:.1f}, chi square {chi:.1f} of 511, critical {critical:.1f}, "
        f"measured total variation {off:.4f}"
    )
    assert chi < critical

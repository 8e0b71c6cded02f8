"""The tie rule, both ways."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracle.statistics.compare import Outcome, unit_roundoff
from oracle.statistics.greedy import Continuation, chance_of_tie, compare_greedy, first_argmax, poisson_quantile

UNIT = unit_roundoff(torch.float32)
V = 50


def continuation(n: int, noise: float, seed: int) -> Continuation:
    """A subject and a yardstick with errors of the same size, the subject choosing by its own logits."""
    generator = torch.Generator().manual_seed(seed)
    truth, own, other = (torch.randn(n, V, generator=generator, dtype=torch.float64) for _ in range(3))
    logits = truth + noise * own
    return Continuation(first_argmax(logits).tolist(), logits, truth, truth + noise * other)


def with_margin(run: Continuation, at: int, margin: float) -> Continuation:
    """The same, but at one place the subject takes another token, which truth puts `margin` behind its best."""
    truth, logits, tokens = run.truth.clone(), run.logits, list(run.tokens)
    assert logits is not None
    logits = logits.clone()
    best = int(truth[at].argmax())
    other = (best + 1) % V
    truth[at, other] = truth[at, best] - margin
    logits[at, other] = logits[at].max() + 1e-9
    tokens[at] = other
    shift = truth - run.truth
    return replace(run, tokens=tokens, logits=logits, truth=truth, yardstick=run.yardstick + shift)


@given(st.integers(0, 2**31), st.integers(1, 64), st.sampled_from([1e-6, 1e-3, 3e-2]))
def test_the_argmax_of_innocent_logits_agrees(seed: int, n: int, noise: float) -> None:
    assert compare_greedy([continuation(n, noise, seed)], UNIT).outcome is Outcome.AGREE


@given(st.integers(0, 2**31))
def test_a_token_that_is_not_the_own_argmax_differs(seed: int) -> None:
    run = continuation(20, 1e-3, seed)
    tokens = list(run.tokens)
    tokens[7] = (tokens[7] + 1) % V
    verdict = compare_greedy([run, replace(run, tokens=tokens)], UNIT)
    assert verdict.outcome is Outcome.DIFFER
    assert verdict.failures[0].where == "row 1, token 7"


@given(st.integers(0, 2**31))
def test_a_disagreement_within_the_yardsticks_budget_is_a_tie(seed: int) -> None:
    run = continuation(40, 2e-2, seed)
    verdict = compare_greedy([with_margin(run, 11, 1e-3)], UNIT)
    assert verdict.outcome is Outcome.AGREE
    assert next(check for check in verdict.checks if check.name == "ties").measured >= 1


@given(st.integers(0, 2**31))
def test_a_disagreement_beyond_it_differs_however_wrong_the_subject_is(seed: int) -> None:
    run = continuation(40, 1e-3, seed)
    worst = float((run.yardstick - run.truth).abs()[11].max())
    wrong = with_margin(run, 11, 60 * worst)
    verdict = compare_greedy([wrong], UNIT)
    assert verdict.outcome is Outcome.DIFFER
    assert "row 0, token 11" in verdict.failures[0].where
    assert wrong.logits is not None
    shouting = replace(wrong, logits=wrong.logits + 0)  # a subject with a huge error of its own gets no wider budget
    shouting.logits[11, wrong.tokens[11]] += 100  # type: ignore[index]
    assert compare_greedy([shouting], UNIT).outcome is Outcome.DIFFER


def test_ties_are_capped() -> None:
    run = continuation(60, 1e-3, 3)
    for at in range(60):
        run = with_margin(run, at, 5e-3)
    verdict = compare_greedy([run], UNIT)
    assert [check.name for check in verdict.failures] == ["ties"]


def test_tokens_alone_can_be_judged() -> None:
    run = replace(continuation(20, 1e-3, 0), logits=None)
    assert compare_greedy([run], UNIT).outcome is Outcome.AGREE


def test_nothing_chosen_is_empty_and_nonsense_differs() -> None:
    run = continuation(4, 1e-3, 0)
    nothing = Continuation([], run.truth[:0], run.truth[:0], run.truth[:0])
    assert compare_greedy([], UNIT).outcome is Outcome.EMPTY
    assert compare_greedy([nothing], UNIT).outcome is Outcome.EMPTY
    assert compare_greedy([nothing, run], UNIT).outcome is Outcome.AGREE
    for tokens in ([*run.tokens[:3], V], [*run.tokens[:3], -1], run.tokens[:3]):
        assert compare_greedy([replace(run, tokens=tokens)], UNIT).outcome is Outcome.DIFFER


def test_the_lowest_id_wins() -> None:
    assert first_argmax(torch.tensor([[1.0, 7.0, 7.0], [2.0, 2.0, 2.0]])).tolist() == [1, 0]


@given(st.floats(0, 60), st.sampled_from([1e-6, 1e-3, 0.1]))
def test_the_cap_is_the_smallest_count_with_that_tail(mean: float, tail: float) -> None:
    def beyond(count: int) -> float:
        return 1 - sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(count + 1))

    cap = poisson_quantile(mean, tail)
    assert beyond(cap) <= tail + 1e-12
    assert cap == 0 or beyond(cap - 1) > tail - 1e-12


def test_the_chance_of_a_tie_is_what_a_simulation_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[0.0, 1.5, 1.4, -1.0]], dtype=torch.float64)
    noisy = truth + 0.1 * torch.randn(100_000, 4, generator=generator, dtype=torch.float64)
    found = float((noisy.argmax(-1) != 1).double().mean())
    assert float(chance_of_tie(truth.amax() - truth, torch.tensor([0.1]))) == pytest.approx(found, abs=0.005)

"""Drift: the divergence is one, the error bars mean what they say, and a budget needs evidence."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_fast.recipes import encoding_named, encodings
from oracle.questions.localise import judge_weights
from oracle.statistics.compare import Outcome
from oracle.statistics.drift import BUDGETS, Drift, DriftBudget, Estimate, Tally, budget_of, judge_drift, measure

V = 40


def tally(noise: float, seed: int, length: int = 256) -> Tally:
    generator = torch.Generator().manual_seed(seed)
    truth = 3 * torch.randn(length, V, generator=generator)
    tokens = torch.randint(V, (length,), generator=generator).tolist()
    return Tally.of([truth + noise * torch.randn(length, V, generator=generator)], [truth], [tokens])


@given(st.integers(0, 2**31), st.floats(0.01, 2))
def test_divergence_is_positive_and_grows_with_the_noise(seed: int, noise: float) -> None:
    small, large = measure(tally(noise, seed)), measure(tally(3 * noise, seed))
    assert 0 < small.kld_mean.value < large.kld_mean.value
    assert small.kld_mean.value < small.kld_p99.value
    assert large.top1_agreement.value <= small.top1_agreement.value <= 1


def test_no_noise_is_no_drift() -> None:
    drift = measure(tally(0.0, 0))
    assert drift.kld_mean == drift.kld_median == drift.kld_p999 == Estimate(0.0, 0.0, 0.0, 0.0)
    assert drift.top1_agreement.value == drift.perplexity_ratio.value == 1.0


def test_a_constant_per_position_is_no_drift() -> None:
    row = torch.randn(64, V, generator=torch.Generator().manual_seed(0)).double()
    shifted = row + torch.arange(64)[:, None]
    assert measure(Tally.of([shifted], [row], [[1] * 64])).kld_mean.value == pytest.approx(0.0, abs=1e-12)


def test_divergence_is_the_textbooks() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.25, 0.5, 0.25]]).double()
    found = Tally.of([q.log()], [p.log()], [[0]])
    assert float(found.kld) == pytest.approx(0.25 * torch.tensor(2.0).log().item())
    assert found.same.tolist() == [0.0]


def test_perplexity_is_that_of_the_actual_next_tokens() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).double()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).double()
    assert measure(Tally.of([q.log()], [p.log()], [[0, 0]])).perplexity_ratio.value == pytest.approx(2.0)


def test_standard_errors_cover_the_scatter_of_other_texts() -> None:
    drifts = [measure(tally(0.3, seed)) for seed in range(40)]
    scatter = torch.tensor([drift.kld_mean.value for drift in drifts]).std()
    stated = torch.tensor([drift.kld_mean.error for drift in drifts]).mean()
    assert 0.5 < float(stated / scatter) < 1.5


def test_the_same_numbers_give_the_same_errors() -> None:
    assert measure(tally(0.3, 5)) == measure(tally(0.3, 5))


def test_intervals_hold_the_estimate_and_quantiles_stand_in_order() -> None:
    drift = measure(tally(0.3, 7))
    for estimate in (drift.kld_mean, drift.kld_median, drift.kld_p99, drift.top1_agreement, drift.perplexity_ratio):
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.high - estimate.low == pytest.approx(4 * estimate.error, rel=0.5)
    assert drift.kld_median.value < drift.kld_mean.value < drift.kld_p99.value < drift.kld_p999.value


def test_the_histogram_counts_every_position() -> None:
    found = tally(0.3, 7)
    assert sum(found.histogram()) == len(found.kld) == 256
    assert tally(0.0, 0).histogram()[0] == 256


def drift_of(kld: float, top1: float, error: float) -> Drift:
    tail = Estimate(kld * 5, error)
    return Drift(512, Estimate(kld, error), tail, tail, tail, Estimate(top1, error), Estimate(1.0, error))


def test_budgets_convict_on_evidence_only() -> None:
    budget, plain = DriftBudget(1e-2, 0.94, 0.03, 1.03, 0.004), drift_of(1e-3, 0.975, 1e-4)
    assert judge_drift(drift_of(5e-3, 0.96, 1e-4), plain, budget).outcome is Outcome.AGREE
    assert judge_drift(drift_of(5e-2, 0.96, 1e-4), plain, budget).outcome is Outcome.DIFFER
    assert judge_drift(drift_of(5e-3, 0.93, 1e-4), plain, budget).outcome is Outcome.DIFFER
    assert judge_drift(drift_of(1.1e-2, 0.96, 1e-2), plain, budget).outcome is Outcome.AGREE
    assert judge_drift(measure(Tally.of([], [], [])), plain, budget).outcome is Outcome.EMPTY


@pytest.mark.parametrize("length", [2, 63, 64, 127])
def test_a_short_text_cannot_convict(length: int) -> None:
    drift, plain = measure(tally(2.0, 1, length)), measure(tally(0.01, 1, length))
    assert drift.kld_mean.value > 1e-2 and math.isnan(drift.kld_mean.error) and math.isnan(drift.kld_mean.low)
    verdict = judge_drift(drift, plain, BUDGETS["int8"])
    assert verdict.outcome is Outcome.EMPTY
    assert f"{length} positions of text, at least 128" in str(verdict)


def test_four_blocks_can() -> None:
    drift, plain = measure(tally(2.0, 1, 128)), measure(tally(0.01, 1, 128))
    assert judge_drift(drift, plain, BUDGETS["int8"]).outcome is Outcome.DIFFER


def test_every_interval_is_told_and_holds_what_was_measured() -> None:
    drift, plain = measure(tally(0.3, 7)), measure(tally(0.1, 7))
    checks = {check.name: check.where for check in judge_drift(drift, plain, BUDGETS["int8"]).checks}
    for where in checks.values():
        value, low, high = map(float, re.findall(r"-?[\d.]+(?:e-?\d+)?", where))
        assert low <= value <= high and low < high
    lost = 1 - drift.top1_agreement.value
    assert checks["top-1 tokens changed"].startswith(f"measured {lost:.3g} [")
    assert f"{1 - drift.top1_agreement.high:.3g}, {1 - drift.top1_agreement.low:.3g}]" in checks["top-1 tokens changed"]


def test_the_written_budgets_are_those_promised() -> None:
    assert BUDGETS["int8"].kld_mean == 1e-2
    assert BUDGETS["int8"].top1_agreement == 0.94
    assert BUDGETS["int8"].top1_behind_plain == 0.03


def test_every_encoding_has_a_budget() -> None:
    """A new encoding is judged only if somebody says what it may cost."""
    assert BUDGETS.keys() == encodings().keys() - {"dense", "stored"}


@pytest.mark.parametrize("name", [*BUDGETS, "int8-g32", "int8-g64-zero", "fp8-g32"])
def test_the_step_of_a_weight_holds_and_is_nearly_reached(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(600, 256, generator=generator) * torch.randn(600, 1, generator=generator).exp()
    weight[::2] *= torch.randn(300, 256, generator=generator).abs()
    weight[:200] = weight[:200].sign() * (1 + weight[:200].abs().clamp(max=1.0)) / 2  # as even as ranges can be
    kind, budget = encoding_named(name), budget_of(name)
    assert budget is not None
    step, drops = budget.weight_step, budget.drops_two_of_four
    dtype = torch.bfloat16 if name == "sparse24" else torch.float32  # which keeps what it does not drop
    held = {"w": kind.decode(kind.encode(weight, dtype)).float()}
    assert judge_weights(held, {"w": weight}, step, drops).outcome is Outcome.AGREE
    assert judge_weights(held, {"w": weight}, 0.8 * step, drops).outcome is Outcome.DIFFER


def test_an_encoding_with_sizes_in_its_name_has_the_budget_of_the_next_larger_group() -> None:
    assert budget_of("int4-g96") == BUDGETS["int4"] and budget_of("int4-g96-zero") == BUDGETS["int4-zero"]
    assert budget_of("int4-g128") == BUDGETS["int4"] and budget_of("int4-g128-zero") == BUDGETS["int4-zero"]
    assert budget_of("int4-g256") is None and budget_of("dense") is None and budget_of("int3-g8") is None


def test_of_four_weights_only_the_two_smallest_may_be_dropped() -> None:
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0, 0.5, 0.25, -8.0, 9.0]])
    lawful = torch.tensor([[4.0, -3.0, 0.0, 0.0, 0.0, 0.0, -8.0, 9.0]])
    for kept, outcome in (
        (lawful, Outcome.AGREE),
        (weight, Outcome.AGREE),
        (torch.tensor([[4.0, 0.0, 2.0, 0.0, 0.0, 0.0, -8.0, 9.0]]), Outcome.DIFFER),  # a larger one
        (torch.tensor([[4.0, 0.0, 0.0, 0.0, 0.0, 0.0, -8.0, 9.0]]), Outcome.DIFFER),  # three
        (torch.tensor([[4.0, 0.0, -3.0, 0.0, 0.0, 0.0, -8.0, 9.0]]), Outcome.DIFFER),  # in another's place
    ):
        assert judge_weights({"w": kept}, {"w": weight}, 1e-3, True).outcome is outcome
    assert judge_weights({"w": lawful}, {"w": weight}, 1e-3).outcome is Outcome.DIFFER

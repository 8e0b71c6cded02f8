"""Laws of the comparison: what must agree, what must differ, and that nothing compared is no pass."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oracle.statistics.budget import LEAST, TABLES, Tail, factors, tails
from oracle.statistics.compare import Check, Outcome, Verdict, compare_logits, compare_stage, empty, unit_roundoff

UNIT = unit_roundoff(torch.float32)
NARROW = unit_roundoff(torch.bfloat16)
seeds = st.integers(0, 2**31)


def noisy(truth: list[Tensor], size: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [t + size * torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in truth]


def rows_of(seed: int, lengths: tuple[int, ...] = (96, 57), vocab: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, vocab, generator=generator, dtype=torch.float64) for length in lengths]


def test_unit_roundoff_is_half_the_gap_above_one() -> None:
    assert unit_roundoff(torch.bfloat16) == 2**-8
    assert unit_roundoff(torch.float32) == 2**-24


@given(seeds)
def test_a_subject_equal_to_the_yardstick_agrees_at_ratio_one(seed: int) -> None:
    truth = rows_of(seed)
    plain = noisy(truth, 1e-5, seed + 1)
    verdict = compare_logits(plain, truth, plain, UNIT)
    assert verdict.outcome is Outcome.AGREE
    assert next(c for c in verdict.checks if c.name == "whole").measured == pytest.approx(1.0)


@given(seeds)
def test_the_truth_itself_agrees(seed: int) -> None:
    truth = rows_of(seed)
    assert compare_logits(truth, truth, noisy(truth, 1e-5, seed), UNIT).outcome is Outcome.AGREE


@given(seeds, st.sampled_from([1e-6, 1e-4, 1e-2]), st.integers(1, 100))
def test_noise_of_the_yardsticks_size_agrees(seed: int, size: float, length: int) -> None:
    truth = rows_of(seed, (length, 40))
    assert (
        compare_logits(noisy(truth, size, seed + 1), truth, noisy(truth, size, seed + 2), UNIT).outcome is Outcome.AGREE
    )


@given(seeds, st.sampled_from([(UNIT, 4.0), (NARROW, 1.5)]))
def test_larger_noise_differs(seed: int, case: tuple[float, float]) -> None:
    unit, factor = case
    truth = rows_of(seed)
    verdict = compare_logits(noisy(truth, factor * 1e-2, seed + 1), truth, noisy(truth, 1e-2, seed + 2), unit)
    assert verdict.outcome is Outcome.DIFFER
    assert verdict.failures[0].name == "whole"


@given(seeds, st.integers(0, 56))
def test_one_wrong_position_differs_and_is_named(seed: int, position: int) -> None:
    truth = rows_of(seed)
    subject = noisy(truth, 1e-5, seed + 1)
    subject[1][position] += 3e-4 * torch.randn(64, generator=torch.Generator().manual_seed(seed)).double()
    verdict = compare_logits(subject, truth, noisy(truth, 1e-5, seed + 2), UNIT, starts=[0, 7])
    assert verdict.outcome is Outcome.DIFFER
    assert f"row 1, position {position + 7}" in {check.where for check in verdict.failures}


@given(seeds)
def test_a_window_of_larger_noise_differs_where_a_run_would_hide_it(seed: int) -> None:
    truth = rows_of(seed, (400,))
    subject = noisy(truth, 1e-5, seed + 1)
    subject[0][64:96] = truth[0][64:96] + 6 * (subject[0][64:96] - truth[0][64:96])
    failures = compare_logits(subject, truth, noisy(truth, 1e-5, seed + 2), UNIT).failures
    assert [check.name for check in failures] == ["window"]
    assert failures[0].where == "row 0, positions 64-95"


@given(seeds, st.floats(-50, 50))
def test_logits_are_compared_up_to_a_constant_per_position(seed: int, shift: float) -> None:
    truth = rows_of(seed)
    plain = noisy(truth, 1e-4, seed + 1)
    subject = noisy(truth, 1e-4, seed + 2)
    shifted = [row.log_softmax(-1) + shift for row in subject]
    a, b = compare_logits(subject, truth, plain, UNIT), compare_logits(shifted, truth, plain, UNIT)
    assert a.outcome is b.outcome is Outcome.AGREE
    assert [c.measured for c in a.checks] == pytest.approx([c.measured for c in b.checks], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("unit", [UNIT, NARROW])
def test_numbers_that_are_none_differ_and_are_named(bad: float, unit: float) -> None:
    truth = rows_of(0)
    subject = noisy(truth, 1e-5, 1)
    subject[1][13, 5] = bad
    verdict = compare_logits(subject, truth, noisy(truth, 1e-5, 2), unit)
    assert verdict.outcome is Outcome.DIFFER
    assert verdict.failures[0].where == "row 1, position 13"


def test_a_truth_that_is_no_number_is_an_error() -> None:
    truth = rows_of(0)
    truth[0][3, 3] = math.nan
    with pytest.raises(ValueError, match="truth holds NaN"):
        compare_logits(rows_of(0), truth, rows_of(0), UNIT)


@pytest.mark.parametrize("rows", [[], [torch.zeros(0, 64)]])
def test_nothing_compared_is_empty(rows: list[Tensor]) -> None:
    assert compare_logits(rows, rows, rows, UNIT).outcome is Outcome.EMPTY
    assert compare_stage(rows, rows, rows, UNIT).outcome is Outcome.EMPTY


def test_rows_positions_or_vocabulary_missing_differ() -> None:
    truth = rows_of(0)
    for subject in (truth[:1], [truth[0], truth[1][:-1]], [row[:, :-1] for row in truth]):
        assert compare_logits(subject, truth, truth, UNIT).outcome is Outcome.DIFFER
        assert compare_stage(subject, truth, truth, UNIT).outcome is Outcome.DIFFER


@given(seeds, st.sampled_from([torch.float32, torch.bfloat16]))
def test_where_the_yardstick_is_exact_one_rounding_is_still_allowed(seed: int, dtype: torch.dtype) -> None:
    truth = [row * 3 for row in rows_of(seed)]
    rounded = [row.to(dtype) for row in truth]
    assert compare_logits(rounded, truth, truth, unit_roundoff(dtype)).outcome is Outcome.AGREE
    coarser = [row + 3 * (r.double() - row) for row, r in zip(truth, rounded)]
    assert compare_logits(coarser, truth, truth, unit_roundoff(dtype)).outcome is Outcome.DIFFER


def test_a_yardstick_far_from_the_truth_proves_nothing() -> None:
    truth = rows_of(0)
    assert compare_logits(truth, truth, noisy(truth, 0.5, 1), NARROW).outcome is Outcome.EMPTY


@given(seeds)
def test_narrow_types_may_have_one_chaotic_position_that_resembles_the_truth(seed: int) -> None:
    truth = rows_of(seed)
    subject, plain = noisy(truth, 1e-2, seed + 1), noisy(truth, 1e-2, seed + 2)
    subject[0][20] = truth[0][20] + 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(seed)).double()
    assert compare_logits(subject, truth, plain, NARROW).outcome is Outcome.AGREE
    assert compare_logits(subject, truth, plain, UNIT).outcome is Outcome.DIFFER
    subject[0][20] = truth[0][21]
    assert compare_logits(subject, truth, plain, NARROW).outcome is Outcome.DIFFER


@given(seeds)
def test_ten_chaotic_positions_are_a_fault_in_any_type(seed: int) -> None:
    truth = rows_of(seed)
    subject = noisy(truth, 1e-2, seed + 1)
    subject[0][20:30] = noisy(truth, 0.3, seed + 3)[0][20:30]
    assert compare_logits(subject, truth, noisy(truth, 1e-2, seed + 2), NARROW).outcome is Outcome.DIFFER


@given(seeds, st.floats(1e2, 1e5))
def test_one_huge_activation_neither_hides_a_fault_nor_makes_one(seed: int, size: float) -> None:
    truth = rows_of(seed)
    truth[0][0, 7] = size

    def rounded(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [t * (1 + 1e-6 * torch.randn(t.shape, generator=generator, dtype=torch.float64)) for t in truth]

    subject = rounded(seed + 1)
    assert compare_stage(subject, truth, rounded(seed + 2), UNIT).outcome is Outcome.AGREE
    subject[0][0, 9] += 1e-3
    assert compare_stage(subject, truth, rounded(seed + 2), UNIT).outcome is Outcome.DIFFER


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("unit", [UNIT, NARROW])
@pytest.mark.parametrize("what", ["logits", "product", "attention", "rope", "gate", "pointwise"])
def test_factors_shrink_with_the_positions_averaged_and_grow_with_those_compared(
    what: str, unit: float, device: str
) -> None:
    found = [factors(what, unit, 1, device).of_average(n) for n in range(1, 400)]
    assert found == sorted(found, reverse=True)
    for orders in (1, 3):  # at one of several positions no less is allowed than on average over a window
        of = factors(what, unit, orders, device)
        assert of.of_position(225)[0] >= of.of_average(32, 225)
    for few, many in ((1, 225), (225, 10_000)):
        for a, b in zip(factors(what, unit).of_position(few), factors(what, unit).of_position(many), strict=True):
            assert 1 < a <= b
    many, more = factors(what, unit).of_position(10_000), factors(what, unit).of_position(10**12)
    assert many[1] < more[1] or more[1] == LEAST["position_max"]


def test_a_device_is_judged_by_what_was_measured_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And by the CPU's tails where nothing was."""
    table = tmp_path / "spread.json"
    looser = {name: tail | {"worst": tail["worst"] + 1} for name, tail in tails("cpu")["attention wide many"].items()}
    table.write_text(json.dumps({"tails": {"attention wide many": looser}}))
    monkeypatch.setitem(TABLES, "strange", table)
    here, there = (factors("attention", UNIT, 3, device).of_average(1000) for device in ("cpu", "strange"))
    assert there == pytest.approx(here * math.e)
    assert factors("gate", UNIT, 3, "strange") == factors("gate", UNIT, 3) == factors("gate", UNIT, 3, "unheard of")


def test_a_tail_is_extrapolated_by_its_exponential() -> None:
    tail = Tail(worst=0.1, start=0.2, share=0.01, scale=0.05)
    assert tail.factor(0.01) == pytest.approx(math.exp(0.3))
    assert tail.factor(0.01 / math.e) == pytest.approx(math.exp(0.35))
    assert tail.factor(0.5) == tail.factor(0.01)  # inside the measured part nothing is extrapolated


def test_verdicts_add_up() -> None:
    good = Verdict((Check("a", 1.0, 2.0),))
    bad = Verdict((Check("b", 3.0, 2.0, "row 0"),))
    none = empty("c", "no positions")
    assert Verdict().outcome is Outcome.EMPTY
    assert (good + good).outcome is Outcome.AGREE
    assert (good + none).outcome is Outcome.EMPTY
    assert (none + bad + good).outcome is Outcome.DIFFER
    assert Verdict((Check("nan", math.nan, 2.0),)).outcome is Outcome.DIFFER
    assert str(bad) == "DIFFER (b 3 of 2 at row 0)"
    assert good.named("x").checks[0].name == "x: a"

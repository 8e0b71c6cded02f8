"""The choice of k: the formula, what is tried, what it may cost to find out, and that a group decides as one."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner
from llama_fast.parallel.tensor_parallel import OverGroup, TensorParallel
from llama_fast.plan import Plan
from llama_fast.speculative import clock
from llama_fast.speculative.adaptive_k import DRAFT, PLAIN, AdaptiveK, Costs, expected_tokens, speedup
from llama_fast.speculative.proposers import Draft, Ngram
from llama_ref.checkpoint import Checkpoint


@given(st.floats(0, 1), st.integers(1, 9))
def test_expected_tokens_is_the_sum_over_accepted_lengths(a: float, k: int) -> None:
    lengths = [a**n * (1 - a) for n in range(k)] + [a**k]
    assert expected_tokens(a, k) == pytest.approx(sum((n + 1) * p for n, p in enumerate(lengths)), abs=1e-9)


def test_the_formula() -> None:
    assert speedup(0.9, 5, 0.25) == pytest.approx((1 - 0.9**6) / (0.1 * 2.25))
    assert speedup(1.0, 7, 0.571, 1.19) == pytest.approx(8 / (1.19 + 7 * 0.571))
    for k in (1, 2, 4, 7):
        assert speedup(0.97, k, 0.9, 1.19) < 1, "a draft nearly as slow as its target"


def paced(c: float, v: float, ks: tuple[int, ...] = (1, 2, 4, 7), new_tokens: int = 200) -> AdaptiveK:
    costs = Costs()
    for kind, seconds in ((PLAIN, 1.0), (DRAFT, c), *((k, v) for k in ks)):
        for _ in range(2):
            costs.add(kind, seconds)
    return AdaptiveK(ks, costs, new_tokens)


def play(pace: AdaptiveK, stood: int | None, rounds: int = 200) -> list[int]:
    """The ks chosen where `stood` proposals stand in every round; None: all."""
    chosen = []
    for _ in range(rounds):
        k = pace.choose([0], 1000)
        chosen.append(k)
        if k:
            n = k if stood is None else min(stood, k)
            pace.record(k, [0], [n], [n + 1])
        else:
            pace.rest()
    return chosen


def test_it_takes_the_best_k_and_none_where_none_wins() -> None:
    assert set(play(paced(0.1, 1.1), None)[20:]) == {7}
    assert set(play(paced(0.1, 1.1), 2)[20:]) <= {2, 4}, "where two stand, seven are too many"
    assert set(play(paced(0.9, 1.2), None)) == {0}, "no k can win: it is not even tried"
    failing = play(paced(0.0, 2.5, (7,)), 0)
    assert 1 <= sum(k > 0 for k in failing) <= 5 and failing[-1] == 0


@given(st.floats(1.0, 6.0), st.floats(0.0, 1.0), st.integers(50, 400))
def test_finding_out_costs_a_bounded_share(v: float, c: float, new_tokens: int) -> None:
    """However long nothing stands: two per cent of the request, or one round where that is more."""
    pace = paced(c, v, (7,), new_tokens)
    play(pace, 0, new_tokens)
    assert pace.balance >= -max(1.0, 0.02 * new_tokens, v + 7 * c - 1) - 1e-9


def test_costs_are_medians_without_the_first_sample() -> None:
    costs = Costs()
    for seconds in (100.0, 1.0, 3.0, 2.0):
        costs.add(PLAIN, seconds)
    costs.add(5, 3.0)
    assert costs.medians[PLAIN] == 2.0 and costs.v(5) == costs.v(2) == 1.5 and costs.c is None
    for _ in range(50):
        costs.add(PLAIN, 4.0)
    assert costs.medians[PLAIN] == 4.0 and costs.count(PLAIN) < 12


def test_a_member_that_is_slower_decides_as_the_others() -> None:
    """What `agree` gives to all is what counts, not what a member measured."""
    told = {}
    for rank, slow in enumerate((1.0, 5.0)):
        costs = Costs(agree=lambda seconds: 2.0)
        for kind in (PLAIN, DRAFT, 4):
            costs.add(kind, slow * (1 if kind == PLAIN else 3))
        told[rank] = (costs.c, costs.v(4))
    assert told[0] == told[1] == (1.0, 1.0)


class AnotherRank(OverGroup):
    """The sum with one other rank, which says 2.5."""

    def total(self, x: Tensor) -> Tensor:
        return x + 2.5


def test_a_group_agrees_through_its_sum(untied: Checkpoint) -> None:
    runner = build(untied, Plan(cache=Static()), "cpu")
    assert clock.agreement(runner)(1.5) == 1.5
    of_two = dataclasses.replace(runner, plan=Plan(shard=TensorParallel(0, 2, AnotherRank())))
    assert clock.agreement(of_two)(1.5) == 4.0


class Slow:
    """A runner whose every step takes a while."""

    def __init__(self, runner: Runner, seconds: float):
        self._runner, self._seconds = runner, seconds

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def step(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self._seconds)
        return self._runner.step(*arguments)  # type: ignore[arg-type]


def test_a_draft_that_cannot_win_is_given_up_with_a_notice(untied: Checkpoint) -> None:
    target = build(untied, Plan(cache=Static()), "cpu")
    slow, quick = Slow(target, 0.08), Slow(target, 0.02)  # far apart: other work on the machine delays both
    plain = generate(target, [[5, 17, 3], [88]], 60).completions
    done = generate(quick, [[5, 17, 3], [88]], 60, draft=Draft(slow))  # type: ignore[arg-type]
    counted = done.speculation
    assert done.completions == plain and counted is not None
    assert counted.plain_steps > 40 and "no k up to 7 wins" in counted.notice
    fast = generate(slow, [[5, 17, 3], [88]], 60, draft=Draft(target)).speculation  # type: ignore[arg-type]
    assert fast is not None and not fast.notice and fast.plain_steps < 10 and fast.tokens_per_round > 4


def test_a_lookup_is_tried_where_something_repeats(untied: Checkpoint) -> None:
    slow = Slow(build(untied, Plan(cache=Static()), "cpu"), 0.005)
    done = generate(slow, [[5, 17, 3] * 8, [88]], 60, draft=Ngram())  # type: ignore[arg-type]
    assert done.speculation is not None and done.speculation.rounds > 0


def watched(pace: AdaptiveK, right: Callable[[int], bool], steps: int) -> tuple[list[int], float]:
    """(the ks chosen, plain steps lost or won) where a lookup has a guess for every token, and `right` says which come true."""
    chosen, account, at = [], 0.0, 0
    while at < steps:
        k = pace.choose([2], 1000)
        chosen.append(k)
        if k:
            n = next((i for i in range(k) if not right(at + i)), k)
            pace.record(k, [2], [n], [n + 1])
            account += n + 1 - pace.cost(k)
            at += n + 1
        else:
            pace.rest()
            pace.watch([2], [right(at)])
            at += 1
    return chosen, account


def test_a_lookup_that_was_given_up_is_asked_again_when_the_text_repeats() -> None:
    pace = paced(0.0, 2.4, ks=(7,))
    before, lost = watched(pace, lambda at: False, 300)
    assert before[-200:] == [0] * 200 and lost > -2.4 * pace.credit
    after, won = watched(pace, lambda at: True, 300)
    assert after[:6] == [0] * 6 and after.count(7) > 30 and won > 150


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_chance_hits_do_not_talk_it_into_losing(share: float) -> None:
    """A guess right two times in five makes 1.7 tokens of a round of 7, which costs 2.4 steps."""
    chance = random.Random(5)
    right = [chance.random() < share for _ in range(3000)]
    _, account = watched(paced(0.0, 2.4, ks=(7,), new_tokens=2000), lambda at: right[at], 2000)
    assert account > -0.03 * 2000


@pytest.mark.parametrize(("without", "wins"), [(0, True), (3, True), (5, False)])
def test_rows_that_have_no_guess_count_as_rows_that_win_nothing(without: int, wins: bool) -> None:
    """One row of all right guesses makes 8 tokens of a round; 2.75 on average of four rows, 2.17 of six, and it costs 2.4."""
    pace = paced(0.0, 2.4, ks=(7,))
    pace.balance = -pace.credit
    for _ in range(120):
        pace.watch([3] + [-1] * without, [True] * (1 + without))
    assert pace.may_lose(7) is wins


def test_a_draft_is_not_judged_by_its_first_proposal() -> None:
    """The ratios of a 7B target and its int8 twin on the fused route; after a second round in vain no k is worth it."""
    pace = paced(0.57, 1.19, new_tokens=200)
    assert pace.choose([0], 1000) == 4
    pace.record(4, [0], [0], [1])
    assert pace.choose([0], 1000) in (1, 2), "another round of 4 could lose more than is left"
    pace.record(2, [0], [0], [1])
    assert pace.choose([0], 1000) == 0


def test_what_is_hoped_of_a_match_decides_whether_it_is_tried_at_once() -> None:
    pace = paced(0.0, 2.7, ks=(7,))
    pace.guess = lambda evidence: (0.9 if evidence >= 4 else 0.5, 3.0)
    assert pace.choose([4], 1000) == 7 and pace.choose([2], 1000) == 0
    for _ in range(8):
        pace.watch([2], [True])
    assert pace.choose([2], 1000) == 7, "seven right guesses in turn, seen for nothing"


def test_a_round_follows_unread_ones_only_where_the_account_covers_all() -> None:
    """Costs of a round: k=7 1.1 + 7 * 0.6 = 5.3 steps, k=2 2.3. Of 200 tokens 4 may be lost."""
    costs = Costs()
    for kind, seconds in ((PLAIN, 1.0), (DRAFT, 0.6), (2, 1.1), (7, 1.1)):
        costs.add(kind, seconds)
        costs.add(kind, seconds)
    pace = AdaptiveK((2, 7), costs, 200)
    assert pace.may_lose(7) and not pace.covers(7, [7], 100), "the first is on trust, not the first two"
    assert pace.covers(2, [2], 100), "2.6 steps at worst"
    pace.balance = 4.0
    assert pace.covers(2, [7], 100) and pace.covers(7, [2], 100)
    assert pace.covers(7, [2], 11) and not pace.covers(7, [2], 9), (
        "of 9 tokens 3 are likely under way: a round of 7 is too long"
    )

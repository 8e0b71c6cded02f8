"""Speculation is the target's own decoding: token by token at temperature 0, and bit by bit through the same shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.generate import generate, stream
from llama_fast.engine.request import requests_of
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import Sampling
from llama_fast.model import matvec
from llama_fast.plan import Plan
from llama_fast.speculative import adaptive_k as pace
from llama_fast.speculative import rounds
from llama_fast.speculative import verification as checks
from llama_fast.speculative.ngrams import Text
from llama_fast.speculative.proposers import Draft, DraftSource, Ngram, Padded, Proposer
from llama_fast.speculative.verification import State
from llama_ref.checkpoint import Checkpoint, random_checkpoint
from oracle.questions.speculation import judge_speculation
from oracle.subjects.speculative import SpeculativeSubject

PROMPTS = [[5, 17, 3], [88], [4, 4, 4, 61, 20, 9, 33], [1, 2]]
NEW = 40
SAMPLED = Sampling(temperature=0.9, top_k=30, top_p=0.95, seed=21)


@pytest.fixture
def target(untied: Checkpoint) -> Runner:
    return build(untied, Plan(cache=Static(), fuse_projections=True), "cpu")


@pytest.fixture
def int8(untied: Checkpoint) -> Runner:
    return build(untied, Plan(Int8(), cache=Static(), fuse_projections=True), "cpu")


@pytest.fixture
def other(untied: Checkpoint) -> Runner:
    """A draft that knows nothing of the target, with the plain cache and one layer."""
    config = dataclasses.replace(untied.config, n_layers=1)
    return build(random_checkpoint(config, 8), Plan(), "cpu")


def proposer(name: str, k: int | None, int8: Runner, other: Runner, aligned: bool = False) -> Proposer:
    return (
        Ngram(k, aligned=aligned)
        if name == "ngram"
        else Draft({"int8": int8, "other": other}[name], k, aligned=aligned)
    )


@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("name", ["int8", "other", "ngram"])
@pytest.mark.parametrize("rows", [1, 4])
def test_greedy_is_plain_decoding_and_bit_for_bit_through_aligned_checks(
    target: Runner, int8: Runner, other: Runner, name: str, k: int, rows: int
) -> None:
    prompts = PROMPTS[:rows] if rows > 1 else PROMPTS[2:3]
    plain = [completion.tokens for completion in generate(target, prompts, NEW).completions]
    wanted = SpeculativeSubject(target, Padded(k), cache_length=128).greedy(prompts, NEW)
    for aligned in (False, True):
        speculative = SpeculativeSubject(target, proposer(name, k, int8, other, aligned), cache_length=128)
        found = speculative.greedy(prompts, NEW)
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted] == plain
        counted = speculative.generations[0].speculation
        assert counted is not None and counted.rounds < rows * NEW, "something was accepted"
    for (_, logits), (_, same) in zip(found, wanted, strict=True):
        assert logits.shape == (NEW, 101) and torch.equal(logits, same)


def test_aligned_checks_do_not_ask_a_product_to_treat_its_rows_alike(
    target: Runner, int8: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some BLAS libraries do not: row 5 of 7 may round otherwise than row 0."""

    def by_place(x: Tensor, weight: Tensor) -> Tensor:
        y = F.linear(x, weight)
        return y * (1 + torch.arange(y.shape[-2])[:, None] * 2**-22) if y.shape[-2] > 1 else y

    monkeypatch.setattr(matvec, "library_product", by_place)
    bits = {}
    for aligned in (False, True):
        wanted = SpeculativeSubject(target, Padded(5), cache_length=128).greedy(PROMPTS, NEW)
        found = SpeculativeSubject(target, Draft(int8, 5, aligned=aligned), cache_length=128).greedy(PROMPTS, NEW)
        bits[aligned] = [torch.equal(a, b) for (_, a), (_, b) in zip(found, wanted, strict=True)]
    assert bits == {False: [False] * 4, True: [True] * 4}


def test_an_aligned_round_loses_what_reaches_past_its_window(untied: Checkpoint) -> None:
    """Windows of 4: from position 3 one token, from 1 three, from 7 one, from 2 two; then four in every round."""
    runner = build(untied, Plan(cache=Static()), "cpu")
    counted = generate(runner, PROMPTS, NEW, draft=Draft(runner, 3, aligned=True)).speculation
    assert counted is not None and counted.acceptance == 1.0
    firsts = {0: 2, 2: 1, 1: 1}  # proposals that the first rounds could take
    assert counted.emitted == 4 * (NEW - 1)
    assert sum(counted.lengths.values()) == counted.rounds
    for stood, rounds_ in firsts.items():
        assert counted.lengths.get(stood, 0) >= rounds_


@pytest.mark.parametrize("plan", [Plan(), Plan(cache=Static())], ids=str)
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_draft_that_is_the_target_is_always_right(untied: Checkpoint, plan: Plan, sampling: Sampling, k: int) -> None:
    """So nothing is missing from its cache, nothing in it is stale, and both sides transform their logits alike."""
    runner = build(untied, plan, "cpu")
    done = generate(runner, PROMPTS, NEW, sampling, draft=Draft(runner, k))
    counted = done.speculation
    assert counted is not None
    assert counted.acceptance == 1.0 and set(counted.lengths) == {k}
    assert counted.rounds == 4 * -(-(NEW - 1) // (k + 1))


def test_automatic_k_gives_the_same_tokens(target: Runner, int8: Runner, other: Runner) -> None:
    plain = generate(target, PROMPTS, NEW).completions
    for name in ("int8", "other", "ngram"):
        assert generate(target, PROMPTS, NEW, draft=proposer(name, None, int8, other)).completions == plain


@pytest.mark.parametrize("name", ["int8", "ngram"])
def test_rows_end_at_a_stop_id_within_a_run(target: Runner, int8: Runner, other: Runner, name: str) -> None:
    plain = generate(target, PROMPTS, NEW).completions
    for at in range(3, 12):
        eos_ids = {plain[0].tokens[at], plain[2].tokens[at + 5]}
        ended = generate(target, PROMPTS, NEW, eos_ids=eos_ids, draft=proposer(name, 5, int8, other)).completions
        assert ended == generate(target, PROMPTS, NEW, eos_ids=eos_ids).completions
        assert ended[0].finish_reason == "stop" and len({len(row.tokens) for row in ended}) > 1


@pytest.mark.parametrize("name", ["int8", "ngram"])
def test_a_seed_repeats_and_rows_do_not_touch(target: Runner, int8: Runner, other: Runner, name: str) -> None:
    draft = proposer(name, 3, int8, other)
    together = generate(target, PROMPTS, 25, SAMPLED, draft=draft).completions
    assert together == generate(target, PROMPTS, 25, SAMPLED, draft=draft).completions
    for b, prompt in enumerate(PROMPTS):
        alone = generate(target, [prompt], 25, dataclasses.replace(SAMPLED, seed=21 + b), draft=draft)
        assert alone.completions[0] == together[b]
    other_seed = dataclasses.replace(SAMPLED, seed=99)
    assert generate(target, PROMPTS, 25, other_seed, draft=draft).completions != together


def test_a_cache_serves_one_speculation_after_another(target: Runner, int8: Runner) -> None:
    draft, cache = Draft(int8, 4), target.allocate(2, 64)
    generate(target, [[1] * 30, [2] * 20], 20, draft=draft, cache=cache)
    short = [[3], [4, 5]]
    assert generate(target, short, 9, draft=draft, cache=cache).completions == generate(target, short, 9).completions


def test_of_two_equal_logits_the_lower_id_is_taken(untied: Checkpoint) -> None:
    """Temperature 0 is an argmax, not a softmax at a low temperature, which would draw among equals."""
    head = torch.zeros_like(untied.weights["output.weight"][:])
    head[torch.arange(50), torch.arange(50) % head.shape[1]] = 1.0  # one term a logit: equal however a product adds up
    head[50:100] = head[:50]
    twinned = dataclasses.replace(untied, weights={**untied.weights, "output.weight": head})
    runner = build(twinned, Plan(cache=Static()), "cpu")
    for draft in (Draft(runner, 3), Ngram(3)):
        for completion in generate(runner, PROMPTS, NEW, draft=draft).completions:
            assert all(token < 50 or token == 100 for token in completion.tokens)


def test_one_wait_for_the_device_a_round(target: Runner, int8: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    pop = rounds.Readback.pop
    monkeypatch.setattr(rounds.Readback, "pop", lambda self: waits.append(1) or pop(self))
    done = generate(target, PROMPTS[:1], NEW, draft=Draft(int8, 3))
    assert (
        done.speculation is not None and len(waits) == done.speculation.rounds + 1
    )  # the first is the prefill's token


@pytest.mark.parametrize(
    ("name", "sampling"),
    [(name, sampling) for name in ("int8", "other", "ngram") for sampling in (Sampling(), SAMPLED)]
    + [("automatic", Sampling())],
)
def test_steps_launched_before_the_last_is_read_change_nothing(
    target: Runner, int8: Runner, other: Runner, name: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the host is ahead: rounds of a draft by one, plain steps by several, and no step too many."""

    def priced(self: rounds.Rounds, k: int, marks: object) -> None:
        """An automatic k gives up a draft that costs nearly what its target does."""
        if k:
            self.adaptive_k.costs.add(pace.DRAFT, 0.9)
        self.adaptive_k.costs.add(k, 1.2 if k else 1.0)

    monkeypatch.setattr(rounds.Rounds, "measure", priced)
    draft = Draft(int8) if name == "automatic" else proposer(name, 3, int8, other)
    eos_ids = {generate(target, PROMPTS[2:3], NEW, sampling).completions[0].tokens[NEW // 2]}
    alone = [generate(target, PROMPTS, NEW, sampling, ids, draft=draft).completions for ids in ((), eos_ids)]

    begin, seen = rounds.Readback.__init__, []

    def ahead(self: rounds.Readback, device: torch.device) -> None:
        begin(self, device)
        self.depth = 2

    def watched(self: rounds.Rounds, launch: Any = rounds.Rounds.launch) -> None:
        seen.append((self, len(self.launched)))
        launch(self)

    monkeypatch.setattr(rounds.Readback, "__init__", ahead)
    monkeypatch.setattr(rounds.Rounds, "launch", watched)
    assert generate(target, PROMPTS, NEW, sampling, draft=draft).completions == alone[0]
    assert max(under_way for _, under_way in seen) == {"ngram": 0, "automatic": 2}.get(name, 1)
    assert not seen[-1][0].launched, "every step was needed"
    assert generate(target, PROMPTS, NEW, sampling, eos_ids, draft=draft).completions == alone[1]


def test_the_statistics_add_up(target: Runner, int8: Runner, other: Runner) -> None:
    for name in ("int8", "other", "ngram"):
        done = generate(target, PROMPTS, NEW, draft=proposer(name, 4, int8, other))
        counted = done.speculation
        assert counted is not None
        assert sum(counted.lengths.values()) == counted.rounds == counted.ks[4]
        assert sum(n * count for n, count in counted.lengths.items()) == counted.accepted
        assert counted.proposed == 4 * counted.rounds
        assert counted.emitted == done.new_tokens - 4, "all but the prefill's tokens"
        assert counted.accepted <= counted.tried <= counted.proposed
        assert counted.accepted + counted.rounds - 4 * 4 <= counted.emitted <= counted.accepted + counted.rounds
        both = counted + counted
        assert both.rounds == 2 * counted.rounds and both.lengths == {
            n: 2 * count for n, count in counted.lengths.items()
        }
        assert both.acceptance == counted.acceptance == counted.as_json()["acceptance"]


def test_the_stream_is_the_completion(target: Runner, int8: Runner) -> None:
    requests = requests_of(PROMPTS, NEW)
    joined, plain = (
        [[event.token for event in row if event is not None] for row in zip(*steps, strict=True)]
        for steps in (stream(target, requests, draft=Draft(int8, 3)), stream(target, requests))
    )
    assert joined == plain


# ---- the lookup ------------------------------------------------------------------------------------------------


def found(row: list[int], k: int, longest: int = 3) -> tuple[int, list[int]]:
    text = Text(1, longest)
    text.extend(row)
    return text.match()[0], text.following(k)


def test_the_lookup_takes_the_longest_match_and_of_these_the_latest() -> None:
    assert found([7, 8, 9, 4, 7, 8], 2) == (2, [9, 4])
    assert found([3, 1, 2, 5, 9, 1, 2, 6, 3, 1, 2], 2) == (3, [5, 9])
    assert found([1, 2, 5, 1, 2, 6, 1, 2], 1) == (2, [6])
    assert found([0, 0, 1, 9, 0, 7], 1) == (0, [0])
    assert found([1, 2, 1, 2], 5) == (2, [1, 2, 1, 2, 1])
    assert found([4, 4, 4], 5) == (2, [4, 4, 4, 4, 4])


def test_a_lookup_of_nothing_yet_proposes_nothing() -> None:
    assert found([], 2) == (0, [0, 0]) and found([5], 2) == (0, [0, 0])


def by_hand(row: list[int], k: int, longest: int) -> tuple[int, list[int]]:
    best, end = 0, 0
    for j in range(len(row) - 1):
        length = 0
        while length < min(longest, j + 1) and row[j - length] == row[len(row) - 1 - length]:
            length += 1
        if length >= max(best, 1):
            best, end = length, j
    cycle = len(row) - 1 - end
    return best, [row[end + 1 + i % cycle] if best else 0 for i in range(k)]


@given(st.lists(st.integers(0, 2), min_size=2, max_size=30), st.integers(1, 6), st.integers(1, 4))
def test_the_lookup_against_a_loop(row: list[int], k: int, longest: int) -> None:
    assert found(row, k, longest) == by_hand(row, k, longest)


# ---- what must not be, planted ---------------------------------------------------------------------------------


class BonusMissing(DraftSource):
    """After full acceptance the last proposal never reaches the draft's cache."""

    def propose(self, state: State, k: int, behind: bool) -> tuple[Tensor, Tensor | None]:
        return super().propose(state, k, False)


class Reset(DraftSource):
    """The draft's cache is emptied instead of rewound."""

    def propose(self, state: State, k: int, behind: bool) -> tuple[Tensor, Tensor | None]:
        for layer in self.cache.layers:
            layer.k.zero_()
            layer.v.zero_()
        return super().propose(state, k, behind)


class OneTooFar(DraftSource):
    """The draft goes on where its rejected tokens ended."""

    def propose(self, state: State, k: int, behind: bool) -> tuple[Tensor, Tensor | None]:
        moved = dataclasses.replace(state, position_B=state.position_B + 1)
        moved.history_BL.scatter_(1, moved.position_B[:, None], state.newest(1))
        return super().propose(moved, k, behind)


@pytest.mark.parametrize("defect", [BonusMissing, Reset, OneTooFar])
def test_a_draft_with_a_defective_cache_is_noticed(
    target: Runner, monkeypatch: pytest.MonkeyPatch, defect: type[DraftSource]
) -> None:
    """By its acceptance: the tokens stay right, whatever is proposed."""
    monkeypatch.setattr("llama_fast.speculative.proposers.DraftSource", defect)
    done = generate(target, PROMPTS, NEW, draft=Draft(target, 2))
    assert done.completions == generate(target, PROMPTS, NEW).completions
    assert done.speculation is not None and done.speculation.acceptance < 0.98


def first_unverified(draft_BK: Tensor, best_BT: Tensor) -> tuple[Tensor, Tensor]:
    same_BK = draft_BK == best_BT[:, :-1]
    same_BK[:, :1] = True
    n_B = rounds_leading(same_BK)
    place_T = torch.arange(best_BT.shape[1])
    padded_BT = torch.nn.functional.pad(draft_BK, (0, 1))
    return torch.where(place_T < n_B[:, None], padded_BT, best_BT.gather(1, n_B[:, None])), n_B + 1


def one_more(draft_BK: Tensor, best_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The rejected token is kept in place of the target's own."""
    n_B = rounds_leading(draft_BK == best_BT[:, :-1])
    padded_BT = torch.cat([draft_BK, best_BT[:, -1:]], 1)
    return padded_BT, n_B + 1


def rounds_leading(stands_BK: Tensor) -> Tensor:
    return stands_BK.long().cumprod(-1).sum(-1)


@pytest.mark.parametrize("defect", [first_unverified, one_more])
def test_unverified_tokens_are_noticed(
    target: Runner, other: Runner, monkeypatch: pytest.MonkeyPatch, defect: object
) -> None:
    assert judge_speculation(target, target.checkpoint, Draft(other, 3), PROMPTS, NEW).outcome.value == "AGREE"
    monkeypatch.setattr(checks, "accept_greedy", defect)
    assert judge_speculation(target, target.checkpoint, Draft(other, 3), PROMPTS, NEW).outcome.value == "DIFFER"


def test_a_position_off_by_one_is_noticed(target: Runner, int8: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all proposals stand, the target's own token after them is taken for one that its cache knows."""
    finish = rounds.finish

    def hasty(choose: Any, draft_BK: Tensor, q: Any, logits_BTV: Tensor, state: State) -> Tensor:
        history_BL, position_B, limit_B = state.history_BL, state.position_B, state.limit_B
        report = finish(choose, draft_BK, q, logits_BTV, state)
        newest_B1, all_B = history_BL.gather(1, position_B[:, None]), report[:, 1] == 3
        position_B.add_(all_B.long())
        limit_B.add_(all_B.long())
        history_BL.scatter_(1, position_B[:, None], newest_B1)
        return report

    monkeypatch.setattr(rounds, "finish", hasty)
    assert judge_speculation(target, target.checkpoint, Draft(int8, 3), PROMPTS, NEW).outcome.value == "DIFFER"


def test_softmax_at_temperature_zero_is_noticed(untied: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    class Soft(rounds.BatchSampler):
        def set_rows(self, first: int, settings: Any, written: Any = None) -> None:
            super().set_rows(first, [dataclasses.replace(one, temperature=1e-6) for one in settings], written)

    monkeypatch.setattr(rounds, "BatchSampler", Soft)
    with pytest.raises(AssertionError):
        test_of_two_equal_logits_the_lower_id_is_taken(untied)


# ---- bad requests ----------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(untied: Checkpoint) -> Iterator[Runner]:
    yield build(random_checkpoint(dataclasses.replace(untied.config, vocab_size=99), 1), Plan(), "cpu")


def test_bad_requests_are_refused_with_their_numbers(target: Runner, int8: Runner, narrow: Runner) -> None:
    with pytest.raises(ValueError, match="vocabulary of 99 tokens, the target one of 101"):
        generate(target, PROMPTS, 9, draft=Draft(narrow, 3))
    short = dataclasses.replace(int8, config=dataclasses.replace(int8.config, max_context=40))
    for k in (3, None):
        with pytest.raises(ValueError, match=f"draft's context of 40 is shorter than the {47 + (k or 0)} positions"):
            generate(target, PROMPTS, 40, draft=Draft(short, k))
    for k in (0, -2):
        for make in (lambda k: Draft(int8, k), Ngram, Padded):
            with pytest.raises(ValueError, match=f"k={k} must be at least 1"):
                make(k)
    with pytest.raises(ValueError, match="k=9 is larger than the context left: 120 positions are asked for, and 8"):
        generate(target, PROMPTS, 113, draft=Ngram(9))
    exact = build(target.checkpoint, Plan(cache=Static(length=50)), "cpu")
    with pytest.raises(ValueError, match="k=9 is larger than the context left: 47 positions are asked for, and 3"):
        generate(exact, PROMPTS, 40, draft=Ngram(9), cache=exact.allocate(4, 50))
    with pytest.raises(ValueError, match="an n-gram of 3 to 2 tokens"):
        Ngram(longest=2, shortest=3)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(target, PROMPTS, 0, draft=Ngram(2))


def test_the_last_positions_of_the_context_can_be_used(target: Runner, int8: Runner) -> None:
    """An automatic k shrinks to the room that is left; where there is none, decoding is plain, and says so."""
    for new in (113, 119, 121):
        plain = generate(target, PROMPTS, new).completions
        for draft in (Draft(int8), Ngram()):
            done = generate(target, PROMPTS, new, draft=draft)
            assert done.completions == plain and done.speculation is not None
            assert max(done.speculation.ks, default=0) <= 121 - new
            assert ("no room" in done.speculation.notice) == (new == 121)
    assert generate(target, PROMPTS, 115, draft=Ngram(6)).completions == generate(target, PROMPTS, 115).completions

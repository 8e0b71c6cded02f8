"""A question that could not have seen its own fault is EMPTY and says so: its events, or its draws, are taken from it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.engine.generate import generate
from llama_fast.recipes import optimised
from llama_fast.speculative.proposers import Ngram
from llama_ref.checkpoint import Checkpoint
from oracle.questions import law, requests, sampling, seeds
from oracle.questions.cases import random_row
from oracle.questions.checkpoints import OtherProcess, judge_round_trip
from oracle.questions.face import Faces
from oracle.questions.generation import judge_draws, pairs_check, shows
from oracle.questions.speculation import judge_speculation
from oracle.questions.tokens import judge_writer
from oracle.statistics.compare import Outcome, Verdict
from oracle.subjects.fast import FastSampler, FastSubject
from oracle.subjects.subject import Setting

CPU = torch.device("cpu")


class OneToken:
    """A loop whose model allows one token: whatever draws there, draws it."""

    name, vocab_size, dtype = "one token", 5, torch.float32

    def sample(self, prompts: Sequence[Any], n: int, setting: Setting, seed: int) -> list[tuple[list[int], Tensor]]:
        logits = torch.full((n, 5), -60.0)
        logits[:, 3] = 60.0
        return [([3] * n, logits) for _ in prompts]


def told(verdict: Verdict) -> tuple[Outcome, str]:
    return verdict.outcome, " ".join(check.where for check in verdict.checks)


def test_draws_from_logits_that_leave_no_choice_say_nothing() -> None:
    outcome, words = told(judge_draws(OneToken(), [[1], [2]], 12, runs=2))  # type: ignore[arg-type]
    assert outcome is Outcome.EMPTY and "likeliest" in words


def test_so_few_pairs_that_none_could_fail_are_not_asked() -> None:
    """24 pairs that are all alike stay below a limit of one in a million, 48 do not."""
    alike = [[(i + 0.5) / 12 for i in range(12) for _ in range(2)]]
    assert pairs_check("pairs", alike * 2).ok and not pairs_check("pairs", alike * 4).ok
    assert not shows([10, 10], [10, 10], 1) and shows([90, 10], [50, 50], 1)


def test_a_prefix_that_nobody_would_miss_is_no_question(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = build(tiny, optimised(), CPU, torch.float32)
    rows = [random_row(257, length, length) for length in (9, 6)]
    assert requests._held(runner, rows).ok and requests._held(runner, rows).compared > 1
    rows = [(7, 7, 7, *row[3:]) for row in rows]  # of one beginning: each would go on as well behind the other's
    found = requests._held(runner, rows)
    assert not found.ok and found.compared == 0 and "another's prefix" in found.where


def test_a_process_beside_that_could_draw_one_token_only_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"greedy": [[3, 3]], "drawn": [[4, 4]]}
    monkeypatch.setattr("oracle.questions.checkpoints.answer", lambda *asked: same)
    monkeypatch.setattr("oracle.questions.checkpoints.as_fresh", lambda subject, rows: subject)
    beside = OtherProcess.__new__(OtherProcess)
    beside.prompts, beside.new_tokens, beside._told = [[1]], 2, same
    assert told(beside.judge(None))[0] is Outcome.EMPTY  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ask, module, name, value",
    [
        (lambda: seeds.judge_seeds(Faces(optimised(), CPU)), seeds, "ROWS", 5),
        (lambda: sampling.judge_sampling(FastSampler(CPU), CPU), sampling, "DRAWS", 256),
        (lambda: law.judge_rounds(CPU), law, "ROWS", 512),
    ],
    ids=["seeds", "sampling", "rounds"],
)
def test_a_tenth_of_the_draws_is_empty(
    ask: Callable[[], Verdict], module: Any, name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "NEW", 5) if module is seeds else None
    monkeypatch.setattr(seeds, "LAGS", (1,))
    outcome, words = told(ask())
    assert outcome is Outcome.EMPTY and ("not tell" in words or "too few" in words)


def test_speculation_that_proposes_nothing_is_plain_decoding(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def plainly(runner: Any, group: Any, n: int, eos_ids: Any = (), cache: Any = None, draft: Any = None) -> Any:
        done = generate(runner, group, n, eos_ids=eos_ids, cache=cache)
        return SimpleNamespace(completions=done.completions, speculation=SimpleNamespace(proposed=0, notice=""))

    runner = build(tiny, optimised(), CPU, torch.float32)
    assert judge_speculation(runner, tiny, Ngram(2), new_tokens=12).outcome is Outcome.AGREE
    monkeypatch.setattr("oracle.subjects.speculative.generate", plainly)
    outcome, words = told(judge_speculation(runner, tiny, Ngram(2), new_tokens=12))
    assert outcome is Outcome.EMPTY and "plain decoding" in words


def test_texts_too_short_to_stop_in_prove_nothing_of_stop_strings() -> None:
    tokens = SimpleNamespace(encode=lambda text, bos=True: [1, 2], decode=lambda ids: "ab" * len(ids), eos_ids=())
    writer = SimpleNamespace(stopped=False, push=lambda token: "ab", finish=lambda: "")
    outcome, words = told(judge_writer(lambda stop: writer, tokens, 1, rows=0))  # type: ignore[arg-type,return-value]
    assert outcome is Outcome.EMPTY and "long enough" in words


@pytest.mark.parametrize("name, asked", [("dense", False), ("int8", True)])
def test_stripes_are_asked_of_what_is_encoded_in_stripes(name: str, asked: bool, tiny: Checkpoint) -> None:
    from llama_fast.recipes import encoding_named

    found = judge_round_trip(tiny, optimised(encoding_named(name)), CPU, torch.float32)
    assert found.outcome is Outcome.AGREE
    assert any("few rows at a time" in check.name for check in found.checks) is asked


def test_a_runner_of_this_size_has_the_power_that_is_asked_for(tiny: Checkpoint) -> None:
    subject = FastSubject(build(tiny, optimised(), CPU, torch.float32), used_cache=True)
    found = judge_draws(subject, [random_row(257, length, length) for length in (9, 5)], 12, runs=2)
    assert found.outcome is Outcome.AGREE and not any("neighbouring" in check.name for check in found.checks)

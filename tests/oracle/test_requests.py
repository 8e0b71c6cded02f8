"""Requests of unusual shapes: what is not told, or is no number, is no agreement."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from catalogue import around
from torch import Tensor
from variations import angles_by_exponentials

from llama_fast.build import build
from llama_fast.engine import logprobs
from llama_fast.model import llama as fast
from llama_fast.recipes import optimised
from llama_ref.checkpoint import Checkpoint, random_checkpoint
from oracle.questions.cases import random_row
from oracle.questions.requests import NEW, _longer, penalised_check, told_check, told_logprobs
from oracle.statistics.compare import Outcome, Verdict

ROWS = [random_row(257, 9, 1), random_row(257, 4, 2)]


def outcome(told: Any) -> Outcome:
    return Verdict((told_check(*told),)).outcome


@pytest.fixture
def told(tiny: Checkpoint) -> tuple[Any, Any, Any]:
    """Tokens by column, logits by column, log-probabilities by row."""
    return told_logprobs(build(tiny, optimised(), torch.device("cpu"), torch.float32), ROWS)


def test_log_probabilities_of_every_token_are_compared(told: tuple[Any, Any, Any]) -> None:
    check = told_check(*told)
    assert check.ok and check.compared == NEW * len(ROWS)


@pytest.mark.parametrize("column", [1, -1], ids=["of the token", "of the likeliest"])
def test_a_log_probability_that_is_no_number_differs(
    column: int, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = logprobs.columns

    def broken(token_B1: Tensor, logits_BV: Tensor, top: int) -> Tensor:
        found = columns(token_B1, logits_BV, top)
        found[1, column] = math.nan
        return found

    monkeypatch.setattr(logprobs, "columns", broken)
    runner = build(tiny, optimised(), torch.device("cpu"), torch.float32)
    check = told_check(*told_logprobs(runner, ROWS))
    assert (
        check.measured == math.inf and check.where == "row 1, token 0" and Verdict((check,)).outcome is Outcome.DIFFER
    )


def test_what_is_not_told_differs(told: tuple[Any, Any, Any]) -> None:
    columns, logits, rows = told
    assert outcome((columns, logits, rows)) is Outcome.AGREE
    assert outcome(([], logits, rows)) is Outcome.DIFFER
    assert outcome((columns[:-1], logits, rows)) is Outcome.DIFFER
    assert outcome((columns, logits[:-1], rows)) is Outcome.DIFFER
    assert outcome((columns, logits, [rows[0], rows[1][:-1]])) is Outcome.DIFFER
    assert outcome((columns, logits, [rows[0], []])) is Outcome.DIFFER


def test_penalised_logits_that_are_no_numbers_differ() -> None:
    def penalised(rows: Any, n: int, penalty: float) -> list[tuple[list[int], Tensor]]:
        return [([7] * n, torch.full((n, 257), math.nan)) for _ in rows]

    subject: Any = SimpleNamespace(runner=SimpleNamespace(device=torch.device("cpu")), penalised=penalised)
    assert penalised_check(subject, ROWS).measured == NEW * len(ROWS)


def test_angles_from_exponentials_are_lawful_at_far_positions_too(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models of these seeds err most of all whose frequencies are exp(-e log theta): the first did exceed its budget while
    the yardstick had powers alone."""
    for seed in (7004, 7000):
        checkpoint = random_checkpoint(tiny.config, seed)
        with monkeypatch.context() as patch:
            around(fast, "rope_table", angles_by_exponentials)(patch)
            verdict = _longer(checkpoint, optimised(), torch.device("cpu"), torch.float32)
        assert verdict.outcome is Outcome.AGREE, verdict

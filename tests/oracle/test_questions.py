"""Questions that know whether they could have seen their fault, and yardsticks that do not commit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from catalogue import DENSE, INT8
from variations import angles_by_exponentials, angles_in_float32

from conftest import TINY
from llama_fast.build import build
from llama_ref.checkpoint import Checkpoint, random_checkpoint
from oracle.questions.checkpoints import judge_window, references
from oracle.questions.face import PROMPTS, ids_of
from oracle.questions.generation import judge_stopping
from oracle.questions.survival import survived
from oracle.questions.tally import Tally
from oracle.statistics.compare import Outcome, Unjudgeable, Verdict, empty
from oracle.statistics.orders import Order
from oracle.subjects.fast import FastSubject
from oracle.subjects.walkers import MARKERS, WALKED, walk, walker

CPU = torch.device("cpu")


def test_a_walker_says_what_is_known_beforehand_and_hardly_repeats_itself() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for plan in (DENSE, INT8):
            subject = FastSubject(build(walker(), plan, CPU, dtype))
            for marker, (tokens, _) in enumerate(subject.greedy([ids_of(prompt) for prompt in PROMPTS], 30)):
                assert tokens == walk(marker, ids_of(PROMPTS[marker])[-1], 30)
                assert len(set(tokens)) == 30
    assert len(MARKERS) == 4 and len({tuple(walk(marker, WALKED[0], 5)) for marker in range(4)}) == 4


def test_a_question_in_which_nothing_happened_is_empty() -> None:
    tally = Tally("tokens that a penalty moves")
    tally.see("row 0", [1], [1], 0)
    assert Verdict((tally.check("penalties"),)).outcome is Outcome.EMPTY
    tally.see("row 1", [1], [1])
    assert Verdict((tally.check("penalties"),)).outcome is Outcome.AGREE
    tally.see("row 2", [1], [2], 0)
    found = Verdict((tally.check("penalties"),))
    assert found.outcome is Outcome.DIFFER and "row 2: [1] instead of [2]" in str(found)


class Monotonous:
    """Says one id over and over, and minds no end id that is not its own."""

    def until(self, prompts: Any, n: int, eos_ids: Any) -> list[tuple[list[int], str]]:
        ended = 5 in eos_ids
        return [([5] if ended else [5] * n, "stop" if ended else "length") for _ in prompts]


def test_text_of_one_id_proves_nothing_of_stop_rules() -> None:
    subject: Any = Monotonous()
    assert judge_stopping(subject, [[1], [2, 3]], 8).outcome is Outcome.EMPTY
    assert judge_stopping(subject, [[1], [2, 3]], 8, quick=True).outcome is Outcome.AGREE


def test_an_error_is_an_answer_and_what_cannot_be_judged_is_not() -> None:
    def raises(error: BaseException) -> Callable[[], Verdict]:
        def ask() -> Verdict:
            raise error

        return ask

    found = survived("draws", raises(IndexError("index 7 is out of bounds")))
    assert (
        found.outcome is Outcome.DIFFER and "IndexError: index 7" in str(found) and "test_questions.py:" in str(found)
    )
    assert survived("draws", raises(MemoryError())).outcome is Outcome.EMPTY
    assert survived("draws", lambda: empty("x", "y")).outcome is Outcome.EMPTY
    with pytest.raises(Unjudgeable):
        survived("draws", raises(Unjudgeable("NaN")))


@pytest.mark.parametrize("table", [angles_in_float32, angles_by_exponentials])
def test_float32_angles_agree_to_the_end_of_a_window(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = random_checkpoint(replace(TINY, n_layers=1, max_context=8192, rope_theta=5e5), 0)
    monkeypatch.setattr("llama_fast.model.llama.rope_table", lambda config: table(None, config))
    verdict, length = judge_window(one, DENSE, CPU, torch.float32)
    assert length == 8192 and verdict.outcome is Outcome.AGREE, verdict.failures


def test_a_yardstick_of_an_encoding_keeps_its_numbers_exact(tiny: Checkpoint) -> None:
    """Its error is that of rounding what comes out, and not that of a rounded matrix."""
    runner = build(tiny, INT8, "cpu", torch.bfloat16)
    _, yardstick = references(runner, tiny)
    matrix = yardstick.weight("layers.0.attention.wq.weight")
    assert matrix.dtype is torch.float32 and not torch.equal(matrix, matrix.bfloat16().float())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with Order(0):
        y = x @ matrix.T
    true = x.double() @ matrix.double().T
    assert y.dtype is torch.bfloat16
    assert float(((y.double() - true) / true.abs()).abs().max()) <= 2 * 2**-8 * 1.01

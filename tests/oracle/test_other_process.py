"""The process beside: what it answers, and what is said of one that could not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.build import build
from llama_fast.plan import Plan
from llama_fast.recipes import optimised
from llama_ref.checkpoint import Checkpoint
from oracle.questions.cases import random_row
from oracle.questions.checkpoints import OtherProcess, answer, as_fresh
from oracle.statistics.compare import Outcome, Verdict
from oracle.subjects.fast import FastSubject

OURS = {"greedy": [[1, 2], [3]], "drawn": [[4], [5, 6]]}
FULL = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 172.00 MiB."


def ask(monkeypatch: pytest.MonkeyPatch, folder: Path, *runs: str | dict[str, Any]) -> tuple[Verdict, int]:
    """The verdict on a child that answers, or ends with this last line, run after run; and how often it ran."""
    (folder / "runs.json").write_text(json.dumps(runs))
    script = folder / "child"
    script.write_text(
        f"""#!{sys.executable}
import json, pathlib, sys
told = pathlib.Path({str(folder)!r}) / "ran"
ran = int(told.read_text()) if told.exists() else 0
told.write_text(str(ran + 1))
answer = json.loads((told.parent / "runs.json").read_text())[ran]
print("chatter", json.dumps(answer), sep="\\n") if isinstance(answer, dict) else sys.exit("Traceback\\n" + answer)
"""
    )
    script.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(script))
    monkeypatch.setattr("oracle.questions.checkpoints.answer", lambda *asked: OURS)
    monkeypatch.setattr("oracle.questions.checkpoints.as_fresh", lambda subject, rows: subject)
    subject: Any = None
    verdict = OtherProcess(["--model", "tiny"], [[1], [2]], 2).judge(subject)
    return verdict, int((folder / "ran").read_text())


def test_the_same_tokens_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verdict, ran = ask(monkeypatch, tmp_path, OURS)
    assert verdict.outcome is Outcome.AGREE and ran == 1


@pytest.mark.parametrize("kind", OURS)
def test_another_row_differs(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verdict, _ = ask(monkeypatch, tmp_path, {**OURS, kind: [OURS[kind][0], [9]]})
    assert verdict.outcome is Outcome.DIFFER
    assert [check.name for check in verdict.failures] == [f"{kind} rows that differ in another process"]


def test_one_that_found_the_gpu_full_is_asked_once_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verdict, ran = ask(monkeypatch, tmp_path, FULL, OURS)
    assert verdict.outcome is Outcome.AGREE and ran == 2


@pytest.mark.parametrize(("runs", "ran"), [([FULL, FULL], 2), (["Segmentation fault"], 1)])
def test_one_that_cannot_run_is_empty_and_says_why(
    runs: list[str], ran: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    verdict, found = ask(monkeypatch, tmp_path, *runs, OURS)
    assert verdict.outcome is Outcome.EMPTY and found == ran
    assert f"ended with 1: {runs[-1]}" in str(verdict)


@pytest.mark.parametrize("plan", [Plan(), optimised()], ids=["growing", "static"])
def test_beside_a_new_process_stands_a_cache_as_long_as_its_own(plan: Plan, tiny: Checkpoint) -> None:
    """A growing cache that served longer texts has more slots: hidden, but attention over them rounds otherwise in bf16."""
    runner = build(tiny, plan, device="cpu", dtype=torch.bfloat16)
    prompts = [random_row(tiny.config.vocab_size, length, seed=length) for length in (12, 5)]
    served = FastSubject(runner, 2, 129, used_cache=True)
    served.greedy([random_row(tiny.config.vocab_size, 100, seed=1)] * 2, 24)
    there = answer(FastSubject(runner, 2, 129), prompts, 24)
    assert answer(as_fresh(served, 2), prompts, 24) == there
    if plan == Plan():  # so that the test could fail
        shown = [subject.greedy(prompts, 24)[0][1] for subject in (served, as_fresh(served, 2))]
        assert not torch.equal(*shown)

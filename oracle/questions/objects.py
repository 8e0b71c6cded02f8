"""State between objects: what one checkpoint, plan or file leaves behind must not reach the next.

Two checkpoints of one config live in one process and are asked in turns; one checkpoint is built under two plans after each
other; a saved model is changed on the disc and opened again. All are walkers (oracle.subjects.walkers): what each says is
known.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from llama_fast.build import build
from llama_fast.engine.runner import Runner
from llama_fast.llama import Llama
from llama_fast.plan import Plan
from llama_fast.weights import named_tensors
from llama_ref.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from oracle.questions.face import PROMPTS, SHORT, Faces, ids_of
from oracle.questions.survival import survived
from oracle.questions.tally import Tally
from oracle.statistics.compare import Verdict
from oracle.subjects.walkers import MARKERS, WALKED, Letters, following, walker

SHIFT = 4


def judge_objects(faces: Faces) -> Verdict:
    """Every question of this file."""
    questions: dict[str, Callable[[Faces], Tally]] = {
        "two checkpoints of one config": _two_checkpoints,
        "two plans after each other": _two_plans,
        "a model changed and opened again": _opened_again,
    }
    return sum((survived(name, partial(_answer, name, ask, faces)) for name, ask in questions.items()), Verdict())


def _answer(name: str, ask: Callable[[Faces], Tally], faces: Faces) -> Verdict:
    return Verdict((ask(faces).check(name),))


def said(prompt: str, shift: int) -> list[int]:
    """What the walker with this shift says after a prompt."""
    ids, tokens = ids_of(prompt), list[int]()
    (marker,) = (number for number, mark in enumerate(MARKERS) if mark in ids)
    for _ in range(SHORT):
        step = following(marker, (tokens or ids)[-1])
        tokens.append(WALKED[(WALKED.index(step) + shift) % len(WALKED)])
    return tokens


def _ask(tally: Tally, what: str, llama: Llama, shift: int) -> None:
    for rows in (list(PROMPTS), [PROMPTS[1]]):
        outs = [out.tokens for out in llama.generate(rows, SHORT)]
        tally.see(what, outs, [said(prompt, shift) for prompt in rows], len(rows))


def _two_checkpoints(faces: Faces) -> Tally:
    tally = Tally("answers")
    llamas = {shift: faces.llama(shift=shift) for shift in (0, SHIFT)}
    for _ in range(2):
        for shift, llama in llamas.items():
            _ask(tally, f"the one shifted by {shift}", llama, shift)
    return tally


def _two_plans(faces: Faces) -> Tally:
    tally, checkpoint = Tally("answers"), walker(shift=SHIFT)
    plans = [faces.plan, replace(Plan(), encoding=faces.plan.encoding), faces.plan]
    made: list[Llama] = []
    for plan in plans:
        made.append(Llama(build(checkpoint, plan, faces.device, torch.float32), Letters()))
        _ask(tally, f"under {plan}", made[-1], SHIFT)
    _ask(tally, "the first, after the others", made[0], SHIFT)
    return tally


def _opened_again(faces: Faces) -> Tally:
    """Under the same path, and under the same path as another directory; its end ids change too."""
    tally = Tally("answers")
    with tempfile.TemporaryDirectory(prefix="llama-oracle-") as folder:
        path = Path(folder) / "model"
        for shift in (0, SHIFT, 1):
            if path.exists():
                shutil.rmtree(path)
            end = said(PROMPTS[1], shift)[3]
            checkpoint = walker((end,), shift)
            tensors = dict(named_tensors(checkpoint, faces.plan, torch.float32, faces.device))
            save_checkpoint(path, checkpoint.config, tensors, faces.plan.encoding.name)
            llama = Llama(_opened(path, faces), Letters())
            tally.see(f"shifted by {shift}", llama.generate(PROMPTS[1], SHORT).tokens, said(PROMPTS[1], shift)[:4])
            tally.see("its end ids", llama.runner.config.eos_ids, (end,))
    return tally


def _opened(path: Path, faces: Faces) -> Runner:
    checkpoint: Checkpoint = open_checkpoint(path)
    return build(checkpoint, faces.plan, faces.device, torch.float32)

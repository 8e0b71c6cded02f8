"""What is asked of a `llama_fast` runner beside its logits: long positions, files, repetition, processes, text."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llama_fast.build import Runner, build, encoded
from llama_fast.plan import Plan
from llama_fast.text import TextStream
from llama_ref.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from llama_ref.tokenizer import Tokenizer
from oracle.adapters import RefSubject, Weights, Yardstick
from oracle.budget import ORDERS
from oracle.cases import random_row
from oracle.compare import Check, Verdict, compare_logits, empty, unit_roundoff
from oracle.fast import FastSubject
from oracle.localise import judge_weights
from oracle.subject import Setting
from oracle.tokens import Encode, judge_tokens, judge_writer

WINDOW_TAIL, WINDOW_STEPS = 40, 8
LONGEST_WINDOW = {"cpu": 8192, "cuda": 32768}
SAVED_BLOCKS = 2


def first_blocks(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """The checkpoint's first blocks as a model of their own."""
    kept = {
        name: source
        for name, source in checkpoint.weights.items()
        if not name.startswith("layers.") or int(name.split(".")[1]) < count
    }
    return replace(checkpoint, config=replace(checkpoint.config, n_layers=count), weights=kept)


def references(runner: Runner, checkpoint: Checkpoint, orders: int = ORDERS) -> tuple[RefSubject, RefSubject]:
    """Truth and yardstick for a runner, on the weights that it means to compute with.

    Dense weights come from the checkpoint and not from the runner, so that a fault of its loading is one. Both hold at
    most one block in their own type at a time: no model is too large for a float64 truth if one of its blocks is not.
    """
    dense = runner.plan.encoding.name == "dense"
    source = checkpoint.weights if dense else runner.reference_weights()
    weights = Weights(source, runner.dtype if dense else None, runner.device)
    config = checkpoint.config
    truth = RefSubject(config, weights, torch.float64, runner.device, "truth")
    if orders == 1:
        return truth, RefSubject(config, weights, runner.dtype, runner.device, "yardstick")
    return truth, Yardstick(config, weights, runner.dtype, runner.device, orders)


def judge_window(checkpoint: Checkpoint, plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[Verdict, int]:
    """The last positions of the longest row that fits, through the model's first block, the embedding and the head.

    Whatever depends on a position does so in every block alike; one block makes the whole window affordable.
    """
    one = first_blocks(checkpoint, 1)
    length = min(one.config.max_context, LONGEST_WINDOW[device.type])
    tail = min(WINDOW_TAIL, length - 1)
    row = random_row(one.config.vocab_size, length, seed=99)
    runner = build(one, plan, device=device, dtype=dtype)
    truth, yardstick = references(runner, one)
    subject = FastSubject(runner)
    found: list[Tensor] = []
    for split, end in ((length - WINDOW_STEPS, length), (length - tail + 1, length - tail + WINDOW_STEPS)):
        if 1 <= split < end <= length:
            found.append(subject.decode_logits([row[:end]], [split])[0])
    starts = [length - WINDOW_STEPS - 1, length - tail][: len(found)]
    true, plain = truth.tail_logits(row, tail), yardstick.tail_logits(row, tail)
    cut = [slice(at - (length - tail), at - (length - tail) + len(rows)) for at, rows in zip(starts, found)]
    verdict = compare_logits(
        found, [true[part] for part in cut], [plain[:, part] for part in cut], unit_roundoff(dtype), starts
    )
    return verdict, length


def judge_round_trip(checkpoint: Checkpoint, plan: Plan, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Encode, save, open again: the same matrices bit for bit, and the same logits, of the first blocks."""
    some = first_blocks(checkpoint, min(SAVED_BLOCKS, checkpoint.config.n_layers))
    tensors = {
        f"{stem}.{part}": tensor for stem, parts in encoded(some, plan, dtype, device) for part, tensor in parts.items()
    }
    rows = [random_row(some.config.vocab_size, length, seed=length) for length in (9, 6)]
    with tempfile.TemporaryDirectory(prefix="llama-oracle-") as folder:
        save_checkpoint(Path(folder) / "saved", some.config, tensors, plan.encoding.name)
        again = open_checkpoint(Path(folder) / "saved")
        before = build(some, plan, device=device, dtype=dtype)
        after = build(again, plan, device=device, dtype=dtype)
        verdict = judge_weights(after.reference_weights(), before.reference_weights(), 0.0).named("saved")
        a, b = (FastSubject(runner).prefill_logits(rows) for runner in (before, after))
    unlike = sum(int((x != y).any(-1).sum()) for x, y in zip(a, b, strict=True))
    config = "" if again.config == some.config else f"config {again.config} instead of {some.config}"
    return verdict + Verdict(
        (
            Check("saved: positions whose logits changed", unlike, 0, "", sum(map(len, rows))),
            Check("saved: config", float(bool(config)), 0, config),
        )
    )


def judge_repetition(subject: FastSubject, rows: Sequence[Sequence[int]], n: int) -> Verdict:
    """The same question twice has the same answer, bit for bit; and how far a batch moves a row, in bits."""
    first, second = (subject.greedy(rows, n) for _ in range(2))
    unlike = sum(not torch.equal(a[1], b[1]) or a[0] != b[0] for a, b in zip(first, second, strict=True))
    return Verdict((Check("rows that change when asked again", unlike, 0, "", len(rows)),))


class OtherProcess:
    """The same model in a process of its own, started early: its tokens must be those of this one."""

    def __init__(self, words: Sequence[str], prompts: Sequence[Sequence[int]], new_tokens: int):
        """`words`: what `python -m oracle.again` is told to build the same model."""
        self.prompts, self.new_tokens = prompts, new_tokens
        question = json.dumps({"prompts": [list(row) for row in prompts], "new_tokens": new_tokens})
        self._child = subprocess.Popen(
            [sys.executable, "-m", "oracle.again", *words, "--ask", question],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def judge(self, subject: FastSubject) -> Verdict:
        """Greedy and drawn tokens of both; EMPTY if the other could not run."""
        out, error = self._child.communicate()
        if self._child.returncode:
            told = (error.strip().splitlines() or ["no reason given"])[-1]
            return empty("process", f"the other process ended with {self._child.returncode}: {told}")
        theirs = json.loads(out.strip().splitlines()[-1])
        ours = answer(subject, self.prompts, self.new_tokens)
        return Verdict(
            tuple(
                Check(f"{kind} rows that differ in another process", a_differs, 0, "", len(self.prompts))
                for kind in ours
                for a_differs in [sum(a != b for a, b in zip(ours[kind], theirs[kind], strict=True))]
            )
        )

    def end(self) -> None:
        """Stop it if it still runs."""
        if self._child.poll() is None:
            self._child.kill()
            self._child.communicate()


def answer(subject: FastSubject, prompts: Sequence[Sequence[int]], n: int) -> dict[str, list[list[int]]]:
    """What both processes are asked."""
    return {
        "greedy": [tokens for tokens, _ in subject.greedy(prompts, n)],
        "drawn": [tokens for tokens, _ in subject.sample(prompts, n, Setting(0.8, top_k=50), seed=7)],
    }


def judge_text(tokenizer: Tokenizer, checkpoint: Checkpoint, witness: Encode | None) -> Verdict:
    """Ids of texts, and text from ids in pieces."""
    config = checkpoint.config
    verdict = judge_tokens(tokenizer, config.vocab_size, config.bos_id, config.eos_ids, witness)
    known = min(config.vocab_size, tokenizer.vocab_size)
    return verdict + judge_writer(lambda stop: TextStream(tokenizer.decode, stop), tokenizer, known)


__all__ = [
    "OtherProcess",
    "answer",
    "first_blocks",
    "judge_repetition",
    "judge_round_trip",
    "judge_text",
    "judge_window",
    "references",
]

"""What is asked of a `llama_fast` runner beside its logits: long positions, files, repetition, processes, text."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.engine.runner import Runner
from llama_fast.engine.text import UNFINISHED, TextStream
from llama_fast.plan import Plan
from llama_fast.weights import named_tensors
from llama_ref.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from llama_ref.tokenizers.contract import Tokenizer
from llama_ref.tokenizers.tokenizer import load_tokenizer
from oracle.questions.cases import random_row
from oracle.questions.localise import judge_weights
from oracle.questions.tokens import TEXTS, Encode, judge_tokens, judge_writer
from oracle.statistics.budget import ORDERS
from oracle.statistics.compare import Check, Verdict, compare_logits, compare_stage, empty, unit_roundoff
from oracle.subjects.adapters import RefSubject, Weights, Yardstick
from oracle.subjects.fast import FastSubject
from oracle.subjects.subject import Setting

WINDOW_TAIL, WINDOW_STEPS = 40, 8
WIDTHS = (1, 1, 1, 2, 2, 5, 5, 2, 5, 1)
"""Tokens of the steps that decode a window's end, again and again."""
WORDS = 2048
EMPTY = torch.empty(0)
LONGEST_WINDOW = {"cpu": 8192, "cuda": 32768}


def first_blocks(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """The checkpoint's first blocks as a model of their own."""
    kept = {
        name: source
        for name, source in checkpoint.weights.items()
        if not name.startswith("layers.") or int(name.split(".")[1]) < count
    }
    stored = None if checkpoint.stored is None else first_blocks(checkpoint.stored, count)
    return replace(checkpoint, config=replace(checkpoint.config, n_layers=count), weights=kept, stored=stored)


def one_block(checkpoint: Checkpoint, device: torch.device) -> Checkpoint:
    """The first block, with a short vocabulary."""
    return few_words(first_blocks(checkpoint, 1), device)


def few_words(one: Checkpoint, device: torch.device) -> Checkpoint:
    """On a CPU a model with the first `WORDS` words of the vocabulary alone: the rest of it costs time, and is asked of the whole
    model."""
    if device.type != "cpu" or one.config.vocab_size <= WORDS:
        return one
    tables = ("tok_embeddings", "output")
    kept = {name: source[:WORDS] if name.split(".")[0] in tables else source for name, source in one.weights.items()}
    return replace(one, config=replace(one.config, vocab_size=WORDS), weights=kept)


def end_blocks(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint's first block and its last as a model of their own: what is numbered is counted to the end."""
    last = checkpoint.config.n_layers - 1
    kept = {}
    for name, source in checkpoint.weights.items():
        if not name.startswith("layers."):
            kept[name] = source
        elif (number := int(name.split(".")[1])) in (0, last):
            kept[name.replace(f"layers.{number}.", f"layers.{min(number, 1)}.", 1)] = source
    return replace(checkpoint, config=replace(checkpoint.config, n_layers=min(2, last + 1)), weights=kept)


def references(runner: Runner, checkpoint: Checkpoint, orders: int = ORDERS) -> tuple[RefSubject, RefSubject]:
    """Truth and yardstick for a runner, on the weights that it means to compute with.

    The numbers of an encoding are exact in both, so that a kernel which rounds them is not excused by a yardstick that does.
    Dense weights come from the checkpoint and not from the runner, so that a fault of its loading is one. Both hold at
    most one block in their own type at a time: no model is too large for a float64 truth if one of its blocks is not.
    """
    dense = runner.plan.encoding.name == "dense"
    source = checkpoint.weights if dense else runner.reference_weights()
    weights = Weights(source, runner.dtype if dense else None, runner.device)
    config = checkpoint.config
    truth = RefSubject(config, weights, torch.float64, runner.device, "truth")
    # an adapter's term is added to a product that is rounded already: one rounding more, as a matrix that holds both would bring
    if not dense and runner.dtype is not torch.float32 and not checkpoint.low_rank:
        return truth, Yardstick(config, weights, runner.dtype, runner.device, orders, stored=True)
    if orders == 1:
        return truth, RefSubject(config, weights, runner.dtype, runner.device, "yardstick")
    return truth, Yardstick(config, weights, runner.dtype, runner.device, orders)


def window_length(checkpoint: Checkpoint, device: torch.device) -> int:
    """Positions up to which a window is judged on a device."""
    return min(checkpoint.config.max_context, LONGEST_WINDOW[device.type])


def judge_window(checkpoint: Checkpoint, plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[Verdict, int]:
    """The last positions of the longest row that fits, through the model's first block, the embedding and the head, in steps of
    one token, two and five.

    Whatever depends on a position does so in every block alike; one block makes the whole window affordable.
    """
    one = one_block(checkpoint, device)
    length = window_length(one, device)
    tail = min(WINDOW_TAIL, length - 1)
    row = random_row(one.config.vocab_size, length, seed=99)
    runner = build(one, plan, device=device, dtype=dtype)
    truth, yardstick = references(runner, one)
    found, starts = [_tail_in_steps(runner, row, length - tail)], [length - tail]
    if length - WINDOW_STEPS > 1:  # a prefill that reaches further, and plain steps to the end
        found.append(FastSubject(runner).decode_logits([row], [length - WINDOW_STEPS])[0])
        starts.append(length - WINDOW_STEPS - 1)
    true, plain = truth.tail_logits(row, tail + 1), yardstick.tail_logits(row, tail + 1)
    cut = [slice(at - (length - tail - 1), None) for at in starts]
    verdict = compare_logits(
        found, [true[part] for part in cut], [plain[:, part] for part in cut], unit_roundoff(dtype), starts
    )
    return verdict + _turned_at_edges(runner, truth, yardstick, length), length


@torch.no_grad()
def _tail_in_steps(runner: Runner, row: Sequence[int], start: int) -> Tensor:
    """Logits from position `start` to the row's end, after a prefill of what stands before, in steps of `WIDTHS`."""
    cache = runner.allocate(1, len(row))
    held_BT = torch.tensor([row[: max(start, 2)]], device=runner.device)
    runner.prefill(held_BT, torch.tensor([start], device=runner.device), cache)
    seen: list[Tensor] = []
    at = start
    for width in itertools.cycle(WIDTHS):
        if at == len(row):
            return torch.cat(seen)
        step_BT = torch.tensor([row[at : at + width]], device=runner.device)
        seen.append(runner.decode(step_BT, torch.tensor([at], device=runner.device), cache)[0].clone())
        at += step_BT.shape[1]
    raise AssertionError


@torch.no_grad()
def _turned_at_edges(runner: Runner, truth: RefSubject, yardstick: RefSubject, length: int) -> Verdict:
    """Queries at both sides of every power of two and at the window's end, one token a row of two, turned by the angles that
    the model's table has there. The table itself is judged elsewhere."""
    model = runner.model
    table = getattr(model, "rope_table", None)
    if table is None:
        return empty("queries at edges", "the model shows no table of angles")
    edges = {2**k + d for k in range(1, 18) for d in (-1, 0, 1)} | {0, length - 1}
    places = sorted(at for at in edges if 0 <= at < length)
    tokens = random_row(runner.config.vocab_size, len(places), seed=98)
    half = len(places) // 2
    cache = runner.allocate(2, length)
    seen: dict[int, Tensor] = {}
    for one, other in zip(range(half), range(half, 2 * half)):
        at_B = torch.tensor([places[one], places[other]], device=runner.device)
        cache.reserve(at_B, 1)

        def keep(stage: str, value: Tensor, pair: tuple[int, int] = (one, other)) -> None:
            if stage == "layers.0.q_rope":
                seen.update(zip(pair, value.detach().reshape(2, -1).clone()))

        model(torch.tensor([[tokens[one]], [tokens[other]]], device=runner.device), at_B, cache, show=keep)
    if not seen:
        return empty("queries at edges", "the model shows none")
    shown = [torch.stack([seen[i] for i in range(2 * half)])]
    cos_sin = table[torch.tensor(places[: 2 * half], device=table.device)]
    true, plain = (one.turned_queries(tokens[: 2 * half], cos_sin) for one in (truth, yardstick))
    verdict = compare_stage(shown, [true], [plain], unit_roundoff(runner.dtype))
    told = tuple(
        replace(check, where=f"position {places[int(check.where.rpartition(' ')[2])]}")
        if check.where.startswith("row 0, position ")
        else replace(check, where="")
        for check in verdict.checks
    )
    return Verdict(told).named("queries at edges")


def judge_round_trip(checkpoint: Checkpoint, plan: Plan, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Encode, save, open again: the same matrices bit for bit, and the same logits, of the first block and the last.

    Encoded once more from a file, few rows at a time: the same again.
    """
    some = end_blocks(checkpoint)
    tensors = dict(named_tensors(some, plan, dtype, device))
    rows = [random_row(some.config.vocab_size, length, seed=length) for length in (9, 6)]
    with tempfile.TemporaryDirectory(prefix="llama-oracle-") as folder:
        save_checkpoint(Path(folder) / "saved", some.config, tensors, plan.encoding.name)
        again = open_checkpoint(Path(folder) / "saved")
        before = build(some, plan, device=device, dtype=dtype)
        after = build(again, plan, device=device, dtype=dtype)
        verdict = judge_weights(after.reference_weights(), before.reference_weights(), 0.0).named("saved")
        a, b = (FastSubject(runner).prefill_logits(rows) for runner in (before, after))
        striped = _in_stripes(some, plan, dtype, device, tensors, Path(folder) / "dense")
    unlike = sum(int((x != y).any(-1).sum()) for x, y in zip(a, b, strict=True))
    config = "" if again.config == some.config else f"config {again.config} instead of {some.config}"
    checks = [
        Check("saved: positions whose logits changed", unlike, 0, "", sum(map(len, rows))),
        Check("saved: config", float(bool(config)), 0, config),
    ]
    if striped is not None:
        name = "tensors that few rows at a time encode otherwise"
        checks.append(Check(name, len(striped), 0, "".join(striped[:1]), len(tensors)))
    return verdict + Verdict(tuple(checks))


def _in_stripes(
    some: Checkpoint, plan: Plan, dtype: torch.dtype, device: torch.device, wanted: dict[str, Tensor], folder: Path
) -> list[str] | None:
    """Names of the tensors that come out otherwise where a file is read and encoded some rows at a time; None of files that are
    read whole."""
    if plan.encoding.name == "dense" or some.encoding != "dense":
        return None
    save_checkpoint(folder, some.config, dict(named_tensors(some, Plan(), None, device)), "dense")
    again = open_checkpoint(folder)
    matrices = [source for source in again.weights.values() if len(source.shape) == 2]
    row_bytes = max(source.shape[1] * source.dtype.itemsize for source in matrices)
    rows = max(1, min(source.shape[0] for source in matrices) // 2 - 1)
    with patch("llama_fast.weights.STRIPE_BYTES", rows * row_bytes):
        found = dict(named_tensors(again, plan, dtype, device))
    return [name for name in {**wanted, **found} if not torch.equal(found.get(name, EMPTY), wanted.get(name, EMPTY))]


def judge_repetition(subject: FastSubject, rows: Sequence[Sequence[int]], n: int) -> Verdict:
    """The same question twice has the same answer, bit for bit."""
    first, second = (subject.greedy(rows, n) for _ in range(2))
    unlike = sum(not torch.equal(a[1], b[1]) or a[0] != b[0] for a, b in zip(first, second, strict=True))
    return Verdict((Check("rows that change when asked again", unlike, 0, "", len(rows)),))


class OtherProcess:
    """The same model in a process of its own, run beside this one: its tokens must be those of this one, and the files what
    witnesses read. Without prompts only these are asked."""

    def __init__(self, words: Sequence[str], prompts: Sequence[Sequence[int]], new_tokens: int):
        """`words`: what `python -m oracle.again` is told to build the same model."""
        self.prompts, self.new_tokens = prompts, new_tokens
        question = json.dumps({"prompts": [list(row) for row in prompts], "new_tokens": new_tokens})
        self._words = [sys.executable, "-m", "oracle.again", *words, "--ask", question]
        self._child = self._start()
        self._told: dict[str, Any] | str | None = None

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def judge(self, subject: FastSubject) -> Verdict:
        """Greedy and drawn tokens of both; EMPTY if the other could not run, on a GPU that was too full not even alone."""
        theirs = self.told()
        if isinstance(theirs, str):
            return empty("process", theirs)
        ours = answer(as_fresh(subject, len(self.prompts)), self.prompts, self.new_tokens)
        if not any(len(set(row)) > 1 for row in ours["drawn"]):
            return empty("process", "no row draws two tokens that are not the same: any process would draw so")
        return Verdict(
            tuple(
                Check(f"{kind} rows that differ in another process", a_differs, 0, "", len(self.prompts))
                for kind in ours
                for a_differs in [sum(a != b for a, b in zip(ours[kind], theirs[kind], strict=True))]
            )
        )

    def told(self) -> dict[str, Any] | str:
        """All that it answered, or why it could not."""
        if self._told is None:
            self._told = self._listened()
        return self._told

    def _listened(self) -> dict[str, Any] | str:
        out, error = self._child.communicate()
        if self._child.returncode and "OutOfMemoryError" in error:
            torch.cuda.empty_cache()  # what this process works no more with
            self._child = self._start()
            out, error = self._child.communicate()
        if self._child.returncode:
            told = (error.strip().splitlines() or ["no reason given"])[-1]
            return f"the other process ended with {self._child.returncode}: {told}"
        answered: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return answered

    def end(self) -> None:
        """Stop it if it still runs."""
        if self._child.poll() is None:
            self._child.kill()
            self._child.communicate()


def as_fresh(subject: FastSubject, rows: int) -> FastSubject:
    """The subject, or one whose caches are as long as those of a new process: where a cache grows, one that served longer texts
    keeps their slots, and attention over more slots sums in another order, though it sees none of them."""
    if subject.runner.plan.cache.fixed_addresses:
        return subject
    return FastSubject(subject.runner, rows, subject.cache_length)


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
    verdict += judge_writer(lambda stop: TextStream(tokenizer.decode, stop), tokenizer, known)
    return verdict + Verdict((_behind_prompts(tokenizer), _reloaded(tokenizer)))


def _behind_prompts(tokenizer: Tokenizer) -> Check:
    """What a continuation's text is: prompt and continuation as text, without the prompt's."""
    wrong, compared = [], 0
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False)
        for cut in {len(ids) // 3, len(ids) // 2, len(ids) - 1}:
            if not 0 < cut < len(ids):
                continue
            prompt, rest = ids[:cut], ids[cut:]
            before, whole = tokenizer.decode(prompt), tokenizer.decode(ids)
            if before.endswith(UNFINISHED) or not whole.startswith(before):
                continue
            stream = TextStream(tokenizer.decode, before=prompt)
            said = "".join([*(stream.push(token) for token in rest), stream.finish()])
            compared += 1
            if said != whole[len(before) :]:
                wrong.append(f"{said[:24]!r} instead of {whole[len(before) :][:24]!r}")
    return Check("continuations that read otherwise behind their prompt", len(wrong), 0, "".join(wrong[:1]), compared)


def _reloaded(tokenizer: Tokenizer) -> Check:
    """A saved tokenizer is the same one: ids, special tokens, conversations."""
    with tempfile.TemporaryDirectory(prefix="llama-oracle-") as folder:
        tokenizer.save(Path(folder))
        again = load_tokenizer(Path(folder))
    unlike = [repr(text[:24]) for text in TEXTS if again.encode(text) != tokenizer.encode(text)]
    for name in ("bos_id", "eos_ids", "vocab_size", "chat_template", "chat_templates"):
        if getattr(again, name, None) != getattr(tokenizer, name, None):
            unlike.append(name)
    return Check("what a saved tokenizer has otherwise", len(unlike), 0, "".join(unlike[:1]), len(TEXTS) + 5)


__all__ = [
    "OtherProcess",
    "answer",
    "as_fresh",
    "first_blocks",
    "judge_repetition",
    "judge_round_trip",
    "judge_text",
    "judge_window",
    "one_block",
    "references",
]

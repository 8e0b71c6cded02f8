"""Judge a plan on a checkpoint: in float32, where structural faults stand out, then in the type it is to run in.

Truth is `llama_ref` in float64 on the weights the subject computes with: rounded to its type, and for a lossy encoding
decode(encode(w)). What the encoding itself costs is a second question, asked of the text (drift) and of the weights.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from llama_fast.build import Runner, build
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint
from oracle.adapters import FastSubject, RefSubject, Weights, angles, radius
from oracle.cases import Case, random_row, standard_case, text_rows
from oracle.certificate import Certificate
from oracle.compare import Outcome, Verdict, empty, unit_roundoff
from oracle.drift import BUDGETS, Drift, Tally, judge_drift, measure
from oracle.judge import Bench, judge
from oracle.localise import Stage, first_beyond, judge_rope_table, judge_stages, judge_weights, summary

Encode = Callable[[str], list[int]]
DRIFT_ROWS, DRIFT_TOKENS = 4, 256
STAGE_TOKENS, STAGE_STEPS = 64, 8


def verify(
    checkpoint: Checkpoint,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    encode: Encode | None = None,
    model_name: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> Certificate:
    """Everything that can be asked of `plan` here. `encode` turns text into ids; without it tokens are random."""
    subject = {
        "model": model_name or str(checkpoint.path or "random"),
        "encoding": plan.encoding.name,
        "plan": str(plan),
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    certificate = Certificate(subject)
    case = standard_case(checkpoint.config.vocab_size, checkpoint.config.max_context, encode)
    for of_type in dict.fromkeys((torch.float32, dtype)):
        name = str(of_type).removeprefix("torch.")
        progress(f"{name}: building")
        runner = build(checkpoint, plan, device=device, dtype=of_type)
        _verify_runner(certificate, runner, checkpoint, case, name, progress)
        if of_type is dtype:
            _verify_encoding(certificate, runner, checkpoint, encode, progress)
        del runner
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return certificate


def _verify_runner(
    certificate: Certificate,
    runner: Runner,
    checkpoint: Checkpoint,
    case: Case,
    name: str,
    progress: Callable[[str], None],
) -> None:
    """Stages, then logits and tokens, of one runner in its own type."""
    truth, yardstick = references(runner, checkpoint)
    subject = FastSubject(runner, batch=len(case.rows), cache_length=case.longest)
    table = getattr(runner.model, "rope_table", None)
    if table is not None:
        angle_Td = angles(checkpoint.config, table.shape[0])
        certificate.parts[f"{name} rope table"] = judge_rope_table(
            cast(Tensor, table), angle_Td, radius(checkpoint.config)
        )
    progress(f"{name}: every stage on its own inputs")
    stages = stage_reports(subject, truth, yardstick, case.rows)
    certificate.parts[f"{name} stages"] = summary(stages)
    certificate.first_fault = certificate.first_fault or first_beyond(stages)
    progress(f"{name}: prefill, decoding, greedy")
    certificate.parts[f"{name} logits"] = judge(subject, Bench(truth, yardstick), case)


def references(runner: Runner, checkpoint: Checkpoint) -> tuple[RefSubject, RefSubject]:
    """Truth and yardstick for a runner, on the weights that it means to compute with.

    Dense weights come from the checkpoint and not from the runner, so that a fault of its loading is one.
    """
    dense = runner.plan.encoding.name == "dense"
    source = checkpoint.weights if dense else runner.reference_weights()
    weights = Weights(source, runner.dtype if dense else None, runner.device)
    config = checkpoint.config
    truth = RefSubject(config, weights, torch.float64, runner.device, "truth")
    return truth, RefSubject(config, weights, runner.dtype, runner.device, "yardstick")


def stage_reports(
    subject: FastSubject, truth: RefSubject, yardstick: RefSubject, rows: Sequence[Sequence[int]]
) -> list[Stage]:
    """Stages of prefill and of a few decode steps."""
    longest = STAGE_TOKENS + STAGE_STEPS
    cut = [row[: max(2, longest - 17 * index)] for index, row in enumerate(rows)]  # unequal, so that rows cannot mix
    traces = subject.trace(cut, [max(1, len(row) - STAGE_STEPS) for row in cut])
    unit = unit_roundoff(subject.dtype)
    return judge_stages(cut, traces, truth, yardstick, truth.config.n_layers, unit)


def _verify_encoding(
    certificate: Certificate,
    runner: Runner,
    checkpoint: Checkpoint,
    encode: Encode | None,
    progress: Callable[[str], None],
) -> None:
    """The second question: what the encoding costs, in its weights and on a text."""
    name = runner.plan.encoding.name
    if checkpoint.encoding != "dense":
        certificate.notes.append(
            f"drift not asked: stored as {checkpoint.encoding}, the original weights are not at hand"
        )
        return
    if name == "dense":
        original = Weights(checkpoint.weights, runner.dtype, runner.device)
        certificate.parts["weights"] = judge_weights(runner.reference_weights(), original, 0.0)
        return
    budget = BUDGETS.get(name)
    if budget is None:
        certificate.parts["drift"] = empty("drift", f"no budget is written down for the encoding {name!r}")
        return
    progress("weights against the original ones")
    original = Weights(checkpoint.weights, None, runner.device)
    certificate.parts["weights"] = judge_weights(runner.reference_weights(), original, budget.weight_step)
    if encode is None:
        certificate.notes.append("drift not asked: random weights predict nothing that could drift")
        return
    progress("drift on a text")
    certificate.drift, certificate.plain_drift = drifts(runner, checkpoint, encode)
    certificate.parts["drift"] = judge_drift(certificate.drift, certificate.plain_drift, budget)


def drifts(runner: Runner, checkpoint: Checkpoint, encode: Encode) -> tuple[Drift, Drift]:
    """What the runner's predictions, and those of plain bf16, are away from the original weights' in float32."""
    weights = Weights(checkpoint.weights, None, runner.device)
    length = min(DRIFT_TOKENS, checkpoint.config.max_context)
    truth = RefSubject(checkpoint.config, weights, torch.float32, runner.device)
    plain = RefSubject(checkpoint.config, weights, torch.bfloat16, runner.device)
    subject = FastSubject(runner)
    of_subject = of_plain = Tally.of([], [], [])
    for row in text_rows(encode, [length] * DRIFT_ROWS):
        true = truth.prefill_logits([row])
        of_subject += Tally.of(subject.prefill_logits([row]), true, [row])
        of_plain += Tally.of(plain.prefill_logits([row]), true, [row])
    return measure(of_subject), measure(of_plain)


def judge_runner(
    runner: Runner,
    checkpoint: Checkpoint,
    prompt: Sequence[int] | None = None,
    new_tokens: int = 64,
    batch: int = 1,
    cache_length: int | None = None,
    seed: int = 1,
) -> Verdict:
    """A quick verdict on a runner as it stands, compiled code and all: beside every rung of a benchmark.

    It runs prefill and decode at no shapes but the runner's own: `batch` rows, a cache of `cache_length`. Asked are the
    generation loop's `new_tokens` after `prompt` (tokens and logits), and a longer random prompt decoded token by
    token. One padded pass of truth and one of the yardstick judge both.
    """
    config = checkpoint.config
    room = min(cache_length or config.max_context, config.max_context)
    prompt = tuple(prompt or random_row(config.vocab_size, 6, seed))
    new_tokens = min(new_tokens, room - len(prompt))
    long = random_row(config.vocab_size, min(80, room), seed + 1)
    start = max(1, len(long) - 32)
    if new_tokens < 1:
        return empty("room", f"a cache of {room} leaves none after {len(prompt)} tokens")
    truth, yardstick = references(runner, checkpoint)
    bench = Bench(truth, yardstick)
    subject = FastSubject(runner, batch, cache_length)
    done = subject.greedy([prompt], new_tokens)
    bench.of([[*prompt, *done[0][0]], long])
    verdict = bench.greedy(_Done(subject, done), [prompt], new_tokens).named("greedy")
    verdict += bench.decode(subject, [long], [start], [len(long)]).named(f"decode from {start}")
    table = getattr(runner.model, "rope_table", None)
    if table is not None:
        verdict += judge_rope_table(cast(Tensor, table), angles(config, table.shape[0]), radius(config))
    return verdict


class _Done:
    """A subject whose greedy continuations are already there."""

    def __init__(self, subject: FastSubject, done: list[tuple[list[int], Tensor]]):
        self.name, self.vocab_size, self.dtype = subject.name, subject.vocab_size, subject.dtype
        self.prefill_logits, self.decode_logits = subject.prefill_logits, subject.decode_logits
        self._done = done

    def greedy(self, prompts: Sequence[Sequence[int]], n: int) -> list[tuple[list[int], Tensor]]:
        return self._done


__all__ = ["Outcome", "drifts", "judge_runner", "references", "stage_reports", "verify"]

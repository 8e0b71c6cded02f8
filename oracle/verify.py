"""Judge a plan on a checkpoint: in float32, where structural faults stand out, then in the type it is to run in.

Truth is `llama_ref` in float64 on the weights the subject computes with: rounded to its type, and for a lossy encoding
decode(encode(w)). What the encoding itself costs is a second question, asked of the text (drift) and of the weights.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from llama_fast.arithmetic.pytorch import PyTorch
from llama_fast.build import build, rebuild
from llama_fast.compilers.eager import Eager
from llama_fast.encodings.dense import Dense
from llama_fast.engine.runner import Runner
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint, random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.formats.hf_config import from_hf, to_hf
from llama_ref.tokenizers.contract import Tokenizer
from oracle.questions.cases import Case, random_row, standard_case, text_rows
from oracle.questions.checkpoints import (
    OtherProcess,
    judge_repetition,
    judge_round_trip,
    judge_text,
    judge_window,
    references,
    window_length,
)
from oracle.questions.eight_bits import judge_kept, judge_loss, kept_stages, without_bits
from oracle.questions.face import PROMPTS, Faces, ids_of, judge_face
from oracle.questions.generation import judge_draws, judge_stopping
from oracle.questions.judge import Bench, judge
from oracle.questions.localise import (
    Stage,
    first_beyond,
    judge_rope_table,
    judge_stages,
    judge_weights,
    layer_curve,
    summary,
)
from oracle.questions.objects import judge_objects
from oracle.questions.requests import judge_requests
from oracle.questions.sampling import judge_sampling
from oracle.questions.seeds import judge_seeds
from oracle.questions.slots import judge_slots
from oracle.questions.stored import judge_stored, rounded_reference
from oracle.questions.tokens import Encode
from oracle.questions.witnesses import of_words
from oracle.report.certificate import Certificate
from oracle.statistics.compare import Outcome, Verdict, empty, unit_roundoff
from oracle.statistics.drift import Drift, Tally, budget_of, judge_drift, measure
from oracle.subjects.adapters import ReadOnce, RefSubject, Weights, Yardstick, angles, radius
from oracle.subjects.fast import FastSampler, FastSubject
from oracle.subjects.subject import Subject, Trace
from oracle.subjects.walkers import walker

DRIFT_ROWS, DRIFT_TOKENS = 4, 256
STAGE_TOKENS, STAGE_STEPS = 64, 8
TOKENS_A_STEP = 5
SHORT = 12  # new tokens where many runs are needed
TINY = LlamaConfig(48, 1, 2, 1, 24, 64, 257, 64)


@dataclass(frozen=True)
class Extras:
    """What more there may be to ask with: a tokenizer, its witness, another text, the words for another process."""

    tokenizer: Tokenizer | None = None
    witness: Encode | None = None
    text: str | None = None
    again: Sequence[str] | None = None
    repeat: bool = True
    """Whether the other process builds the model too, or only listens to witnesses."""


def verify(
    checkpoint: Checkpoint,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    encode: Encode | None = None,
    model_name: str = "",
    progress: Callable[[str], None] = lambda _: None,
    extras: Extras = Extras(),
) -> Certificate:
    """Everything that can be asked of `plan` here. `encode` turns text into ids; without it tokens are random.

    An error inside a question is its answer, and differs; only what cannot be built, or judged at all, is raised.
    """
    certificate = Certificate(
        subject_of(model_name or str(checkpoint.path or "random"), str(plan), plan, device, dtype)
    )
    asked, plan = plan, without_bits(plan)
    checkpoint = replace(checkpoint, weights=ReadOnce(checkpoint.weights))
    config = checkpoint.config
    case = standard_case(config.vocab_size, config.max_context, encode)
    beside: OtherProcess | None = None
    try:
        for of_type in dict.fromkeys((torch.float32, dtype)):
            name = str(of_type).removeprefix("torch.")
            if (
                of_type is dtype and extras.again is not None
            ):  # not before, or the device holds it beside a float32 model
                words = [*extras.again, "--cache-length", str(case.longest)]
                beside = OtherProcess(words, case.prompts if extras.repeat else (), SHORT)
            if not certificate.parts:
                _verify_loops(certificate, plan, device, progress)
                if extras.tokenizer is not None:
                    ask = partial(judge_text, extras.tokenizer, checkpoint, extras.witness)
                    certificate.ask("text", ask)
            progress(f"{name}: building")
            runner = build(checkpoint, plan, device=device, dtype=of_type)
            if "sampling" not in certificate.parts:
                kernels = runner.model.operations.sampling_kernels if device.type == "cuda" else None
                certificate.ask("sampling", partial(judge_sampling, FastSampler(device, kernels), device))
            subject, truth, yardstick = _verify_runner(certificate, runner, checkpoint, case, name, progress)
            _verify_window(certificate, checkpoint, plan, device, of_type, progress)
            if of_type is dtype:
                _verify_loop(certificate, subject, case, beside if extras.repeat else None, progress)
                _verify_encoding(certificate, truth, runner, checkpoint, encode, progress, extras.text)
            if asked != plan:
                progress(f"{name}: keys and values in eight bits")
                narrow = rebuild(runner, replace(asked, compiler=runner.plan.compiler))
                question = partial(_verify_eight_bits, certificate, name, narrow, truth, yardstick, case.rows)
                certificate.ask(f"{name} eight bits", question)
                if of_type is dtype and encode is not None:
                    rows = text_rows(encode, [min(DRIFT_TOKENS, config.max_context)] * DRIFT_ROWS, text=extras.text)
                    certificate.ask("loss by eight bits", partial(judge_loss, narrow, runner, rows))
                del narrow, question  # which hold the model
            del runner, subject, truth, yardstick
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if plan.encoding.name == "stored" and checkpoint.stored is not None:
            certificate.notes.append("round trip not asked: its matrices are kept as its own file has them")
        else:
            progress("saving and opening again")
            certificate.ask("round trip", partial(_round_trip, checkpoint, plan, device, dtype))
        if beside is not None:
            _add_witnesses(certificate, beside.told())
        else:
            certificate.notes.append("no witness was asked of the files: the model has no name to open it by again")
    finally:
        if beside is not None:
            beside.end()
    return certificate


def _verify_loops(certificate: Certificate, plan: Plan, device: torch.device, progress: Callable[[str], None]) -> None:
    """What does not depend on the model: on walkers and tiny models the face, seeds, objects and draws.

    Their shapes would be compiled, and tuned, for these questions alone: asked are the plan's encoding and cache, with
    PyTorch's operators. Kernels that choose tokens are asked by themselves, when the model is built.
    """
    progress("the library's face, seeds, objects, slots")
    plain = replace(plan, compiler=Eager(), arithmetic=PyTorch())
    plain, told = for_small_models(plain, device, [walker(), random_checkpoint(TINY)])
    certificate.notes += told
    certificate.ask("face", lambda: judge_face(plain, device))
    certificate.ask("seeds", lambda: judge_seeds(Faces(plain, device)))
    certificate.ask("objects", lambda: judge_objects(Faces(plain, device)))
    certificate.ask("rows that come and go", lambda: judge_slots(Faces(plain, device)))
    certificate.ask("loop", lambda: judge_loop(plain, device))


def for_small_models(plan: Plan, device: torch.device, models: Sequence[Checkpoint]) -> tuple[Plan, list[str]]:
    """The plan, with dense weights if its encoding cannot hold these models' columns; and what a certificate says of that."""
    try:
        for model in models:
            build(model, plan, device, torch.float32)
    except ValueError as error:
        return replace(plan, encoding=Dense()), [f"walkers and tiny models have dense weights here: {error}"]
    return plan, []


def judge_loop(plan: Plan, device: torch.device) -> Verdict:
    """Stop rules of a walker, whose text has no two tokens alike, and draws of a tiny random model by the hundred."""
    walks = FastSubject(build(walker(), plan, device, torch.float32), used_cache=True)
    verdict = judge_stopping(walks, [ids_of(prompt) for prompt in PROMPTS], SHORT).named("walker")
    tiny = build(random_checkpoint(TINY, 0, device, torch.float32), plan, device, torch.float32)
    prompts = [random_row(TINY.vocab_size, length, seed=length) for length in (9, 5)]
    return verdict + judge_draws(FastSubject(tiny, used_cache=True), prompts, SHORT, runs=8, copies=4).named("tiny")


def _round_trip(checkpoint: Checkpoint, plan: Plan, device: torch.device, dtype: torch.dtype) -> Verdict:
    no_file = has_no_file(checkpoint)
    if no_file:
        return empty("round trip", no_file)
    return judge_round_trip(checkpoint, replace(plan, compiler=Eager()), device, dtype)


def _add_witnesses(certificate: Certificate, said: dict[str, Any] | str) -> None:
    """What other readers of the same files said, and what had none."""
    if isinstance(said, str):
        certificate.parts["witnesses"] = empty("witnesses", said)
        return
    told = of_words(said["witnesses"])
    if told.compared:
        certificate.parts["witnesses"] = told.verdict()
    certificate.notes += [f"no witness of {without}" for without in told.without]


def has_no_file(checkpoint: Checkpoint) -> str:
    """Why a checkpoint cannot be encoded and saved; empty if it can."""
    try:
        from_hf(to_hf(checkpoint.config))
    except ValueError as error:
        return f"no config.json says what this config says ({error})"
    return ""


def subject_of(model: str, how: str, plan: Plan | None, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The head of a certificate."""
    return {
        "model": model,
        "encoding": "dense" if plan is None else plan.encoding.name,
        "plan": how,
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def _verify_runner(
    certificate: Certificate,
    runner: Runner,
    checkpoint: Checkpoint,
    case: Case,
    name: str,
    progress: Callable[[str], None],
) -> tuple[FastSubject, RefSubject, RefSubject]:
    """Stages, then logits and tokens, of one runner in its own type. The subject, truth and yardstick, to be asked more."""
    truth, yardstick = references(runner, checkpoint)
    width = None if runner.plan.compiler.compiles_each_shape else TOKENS_A_STEP  # another width compiles anew
    subject = FastSubject(runner, len(case.rows), case.longest, used_cache=True, tokens_a_step=width)
    table = getattr(runner.model, "rope_table", None)
    if table is not None:
        angle_Td = angles(checkpoint.config, table.shape[0])
        certificate.parts[f"{name} rope table"] = judge_rope_table(
            cast(Tensor, table), angle_Td, radius(checkpoint.config)
        )
    progress(f"{name}: every stage on its own inputs")
    certificate.ask(f"{name} stages", partial(_verify_stages, certificate, name, subject, truth, yardstick, case.rows))
    progress(f"{name}: prefill, decoding, greedy")
    bench = Bench(truth, yardstick)
    certificate.ask(f"{name} logits", partial(judge, subject, bench, case))
    certificate.positions[name] = bench.curves
    return subject, truth, yardstick


def _verify_stages(
    certificate: Certificate,
    name: str,
    subject: FastSubject,
    truth: RefSubject,
    yardstick: RefSubject,
    rows: Sequence[Sequence[int]],
) -> Verdict:
    """Every stage; of an encoding whose products are rounded, also whether its numbers were."""
    cut, traces = shown_stages(subject, truth, rows)
    n_layers, plan = truth.config.n_layers, subject.runner.plan
    stages = judge_stages(cut, traces, truth, yardstick, n_layers, unit_roundoff(subject.dtype))
    certificate.layers[name] = layer_curve(stages)
    certificate.first_fault = certificate.first_fault or first_beyond(stages)
    if plan.encoding.name != "dense" and subject.dtype is not torch.float32:
        rounded = rounded_reference(truth, subject.dtype)
        certificate.ask(f"{name} stored numbers", partial(judge_stored, cut, traces, truth, rounded, n_layers))
    return summary(stages)


def _verify_eight_bits(
    certificate: Certificate,
    name: str,
    runner: Runner,
    truth: RefSubject,
    yardstick: RefSubject,
    rows: Sequence[Sequence[int]],
) -> Verdict:
    """What a cache of eight bits keeps, and attention over it."""
    subject = FastSubject(runner)
    cut, traces = shown_stages(subject, truth, rows)
    unit, layers = unit_roundoff(subject.dtype), truth.config.n_layers
    stages = kept_stages(judge_stages(cut, traces, truth, yardstick, layers, unit))
    certificate.first_fault = certificate.first_fault or first_beyond(stages)
    return judge_kept(traces, truth.config.head_dim, unit) + summary(stages)


def _verify_window(
    certificate: Certificate,
    checkpoint: Checkpoint,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[str], None],
) -> None:
    """The whole window; compiled code is left aside, since its shapes would be compiled for this alone."""
    name = str(dtype).removeprefix("torch.")
    progress(f"{name}: requests of unusual shapes, the whole window")
    uncompiled = replace(plan, compiler=Eager()) if plan.compiler.compiles_each_shape else plan
    certificate.ask(f"{name} requests", partial(judge_requests, checkpoint, uncompiled, device, dtype))
    certificate.ask(f"{name} window", lambda: judge_window(checkpoint, uncompiled, device, dtype)[0])
    length = window_length(checkpoint, device)
    if length < checkpoint.config.max_context:
        told = f"positions of the window judged to {length} of {checkpoint.config.max_context}; its angles to the end"
        certificate.notes += [] if told in certificate.notes else [told]


def _verify_loop(
    certificate: Certificate,
    subject: FastSubject,
    case: Case,
    beside: OtherProcess | None,
    progress: Callable[[str], None],
) -> None:
    """The generation loop: ends, draws, repetition, another process."""
    progress("stop rules, draws, repetition")
    short = min(SHORT, case.new_tokens)
    certificate.ask("stop rules", partial(judge_stopping, subject, case.prompts, min(8, short), quick=True))
    certificate.ask("draws", partial(judge_draws, subject, case.prompts, short, runs=2))
    certificate.ask("repetition", partial(judge_repetition, subject, case.prompts, short))
    if beside is None:
        certificate.notes.append("other processes not asked: the model has no name, or would be compiled there again")
    else:
        certificate.ask("other process", partial(beside.judge, subject))


def verify_other(
    subject: Subject,
    checkpoint: Checkpoint,
    device: torch.device,
    encode: Encode | None = None,
    model_name: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> Certificate:
    """A subject that is not ours, in the type it runs in: logits by all its routes, and the stages that it shows."""
    config = checkpoint.config
    certificate = Certificate(subject_of(model_name, subject.name, None, device, subject.dtype))
    if subject.vocab_size != config.vocab_size:
        raise ValueError(f"the subject's vocabulary of {subject.vocab_size} is not the model's of {config.vocab_size}")
    case = standard_case(config.vocab_size, config.max_context, encode)
    bench = bench_for(checkpoint, subject.dtype, device)
    progress("prefill, decoding, greedy")
    name = str(subject.dtype).removeprefix("torch.")
    trace = getattr(subject, "trace", None)
    if trace is not None:
        rows = [row[: STAGE_TOKENS - 17 * i] for i, row in enumerate(case.rows)]
        add_stages(certificate, name, rows, trace(rows, [len(row) for row in rows]), bench)
    certificate.parts[f"{name} logits"] = judge(subject, bench, case)
    certificate.positions[name] = bench.curves
    return certificate


def bench_for(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Bench:
    """Truth and yardstick on a checkpoint's weights, each rounded once to `dtype`."""
    weights = Weights(checkpoint.weights, dtype, device)
    truth = RefSubject(checkpoint.config, weights, torch.float64, device, "truth")
    return Bench(truth, Yardstick(checkpoint.config, weights, dtype, device))


def add_stages(
    certificate: Certificate, name: str, rows: Sequence[Sequence[int]], traces: list[dict[str, Tensor]], bench: Bench
) -> None:
    """Judge what a subject showed of its stages, and add it."""
    truth, yardstick = cast(RefSubject, bench.truth), cast(RefSubject, bench.yardstick)
    stages = judge_stages(rows, traces, truth, yardstick, truth.config.n_layers, bench.unit)
    certificate.parts[f"{name} stages"] = summary(stages)
    certificate.layers[name] = layer_curve(stages)
    certificate.first_fault = certificate.first_fault or first_beyond(stages)


def edge_row(vocab_size: int) -> tuple[int, ...]:
    """Ids at which tables and integers end: 0, the last ones, and both sides of powers of two."""
    ids = {0, vocab_size - 1, vocab_size - 2, *(2**k + d for k in range(1, 18) for d in (-1, 0))}
    return tuple(sorted((token for token in ids if 0 <= token < vocab_size), key=lambda token: -token))


def stage_reports(
    subject: FastSubject, truth: RefSubject, yardstick: RefSubject, rows: Sequence[Sequence[int]]
) -> list[Stage]:
    """Stages of prefill and of a few decode steps, of a case's rows and of ids at edges."""
    cut, traces = shown_stages(subject, truth, rows)
    unit = unit_roundoff(subject.dtype)
    return judge_stages(cut, traces, truth, yardstick, truth.config.n_layers, unit)


def shown_stages(
    subject: FastSubject, truth: RefSubject, rows: Sequence[Sequence[int]]
) -> tuple[list[Sequence[int]], list[Trace]]:
    """The rows that stages are asked on, and what the subject shows of each."""
    longest = STAGE_TOKENS + STAGE_STEPS
    cut = [row[: max(2, longest - 17 * index)] for index, row in enumerate(rows)]  # unequal, so that rows cannot mix
    cut.append(edge_row(truth.vocab_size)[: min(40, truth.config.max_context)])
    return cut, subject.trace(cut, [max(1, len(row) - STAGE_STEPS) for row in cut])


def _verify_encoding(
    certificate: Certificate,
    truth: RefSubject,
    runner: Runner,
    checkpoint: Checkpoint,
    encode: Encode | None,
    progress: Callable[[str], None],
    text: str | None = None,
) -> None:
    """The second question: what the encoding costs, in its weights and on a text."""
    name = runner.plan.encoding.name
    if checkpoint.encoding != "dense":
        certificate.notes.append(
            f"drift not asked: stored as {checkpoint.encoding}, the original weights are not at hand"
        )
        return
    lossy = name not in ("dense", "stored")
    budget = budget_of(name)
    if lossy and budget is None:
        certificate.parts["drift"] = empty("drift", f"no budget is written down for the encoding {name!r}")
        return
    # truth computes with these already: of an encoding what it decodes to, else the checkpoint's
    held: Any = truth.weights if lossy else runner.reference_weights()
    original: Any = truth.weights
    if lossy:
        original = Weights(checkpoint.weights, None, runner.device)
    elif name == "stored":  # narrow numbers are kept exactly, where those stored as floats have the arithmetic's type
        held, original = (Weights(each, runner.dtype, runner.device) for each in (held, checkpoint.weights))
    progress("weights against the original ones")
    step, drops = (0.0, False) if budget is None else (budget.weight_step, budget.drops_two_of_four)
    certificate.ask("weights", partial(judge_weights, held, original, step, drops))
    if encode is None:
        certificate.notes.append("drift not asked: random weights predict nothing that could drift")
        return
    if not lossy and runner.dtype is torch.float32:
        certificate.notes.append("drift not asked: dense weights in float32 are the original model")
        return
    progress("drift on a text")
    certificate.drift, certificate.plain_drift, certificate.histogram = drifts(runner, checkpoint, encode, text)
    if budget is not None:
        certificate.parts["drift"] = judge_drift(certificate.drift, certificate.plain_drift, budget)


def drifts(
    runner: Runner, checkpoint: Checkpoint, encode: Encode, text: str | None = None
) -> tuple[Drift, Drift, dict[str, list[int]]]:
    """What the runner's predictions, and those of plain bf16, are away from the original weights' in float32."""
    weights = Weights(checkpoint.weights, None, runner.device)
    length = min(DRIFT_TOKENS, checkpoint.config.max_context)
    truth = RefSubject(checkpoint.config, weights, torch.float32, runner.device)
    plain = RefSubject(checkpoint.config, weights, torch.bfloat16, runner.device)
    subject = FastSubject(runner)
    of_subject = of_plain = Tally.of([], [], [])
    for row in text_rows(encode, [length] * DRIFT_ROWS, text=text):
        true = truth.prefill_logits([row])
        of_subject += Tally.of(subject.prefill_logits([row]), true, [row])
        of_plain += Tally.of(plain.prefill_logits([row]), true, [row])
    histogram = {"subject": of_subject.histogram(), "plain bf16": of_plain.histogram()}
    return measure(of_subject), measure(of_plain), histogram


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
    truth, yardstick = references(runner, checkpoint, orders=1)
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


__all__ = ["Outcome", "drifts", "judge_runner", "references", "stage_reports", "verify", "verify_other"]

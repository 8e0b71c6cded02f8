"""`llama-oracle verify`, `record-cases`, `judge`: exit 0 AGREE, 1 DIFFER or EMPTY, 2 could not run (one line on stderr)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_ref.command import complain, one_line, run, writable
from oracle.statistics.compare import Outcome

if TYPE_CHECKING:
    import torch

    from llama_fast.engine.speculation import Speculation
    from llama_fast.plan import Plan
    from llama_ref.checkpoint import Checkpoint
    from llama_ref.config import LlamaConfig
    from llama_ref.models import Model
    from oracle.questions.tokens import Encode
    from oracle.report.certificate import Certificate

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

ModelFlag = Annotated[str, typer.Option(help="directory, GGUF file, hub id, smollm2-135m or random:NAME[:SEED]")]
DeviceFlag = Annotated[str | None, typer.Option(help="cpu or cuda")]
JsonFlag = Annotated[Path | None, typer.Option(help="write the certificate here")]
HtmlFlag = Annotated[Path | None, typer.Option(help="write the certificate as a page with pictures here")]


@app.callback()
def _group() -> None:
    """Judge a Llama against the reference: float64 truth, budgets from rounding and a stated false-alarm rate."""


@app.command()
def verify(
    model: ModelFlag = "smollm2-135m",
    subject: Annotated[
        str, typer.Option(help="ours, transformers, or package.module:function of tokens [B, T] to logits [B, T, V]")
    ] = "ours",
    adapter: Annotated[str | None, typer.Option(help="a LoRA directory of PEFT, applied to the model")] = None,
    encoding: Annotated[
        str | None, typer.Option(help="how weights are stored; the checkpoint's own by default")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="judge the compiled phases")] = False,
    fused: Annotated[bool, typer.Option("--fused", help="judge our own kernels; needs a GPU")] = False,
    cache: Annotated[str, typer.Option(help="how keys and values are kept: static, growing or paged")] = "static",
    cache_bits: Annotated[
        int | None, typer.Option(help="keep keys and values in 8 bits; by default in the type of the arithmetic")
    ] = None,
    projections: Annotated[str, typer.Option(help="q, k, v and gate, up: joined or separate")] = "joined",
    rung: Annotated[str | None, typer.Option(help="judge the very plan of a rung of `llama-fast bench`")] = None,
    ranks: Annotated[int | None, typer.Option(help="judge a model cut over so many processes of this host")] = None,
    stages: Annotated[int, typer.Option(help="the processes are so many pipeline stages, each cut over as many")] = 1,
    draft: Annotated[
        str | None, typer.Option(help="judge speculation too: a model with the same vocabulary, or ngram")
    ] = None,
    draft_encoding: Annotated[str | None, typer.Option(help="how the draft's weights are stored")] = None,
    speculate: Annotated[int | None, typer.Option(help="tokens proposed in a round; 5 by default")] = None,
    device: DeviceFlag = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16")] = None,
    text: Annotated[Path | None, typer.Option(help="measure drift on this text instead of the shipped one")] = None,
    json: JsonFlag = None,
    html: HtmlFlag = None,
) -> None:
    """Judge prefill, decoding, every stage, text, sampling, stop rules, files; for a lossy encoding also its cost."""

    from llama_fast.devices import default_dtype, where
    from llama_fast.parallel.ranks import Place, join
    from llama_fast.recipes import chosen_encoding
    from llama_ref.models import resolve
    from oracle.plans import Words, rung_plans
    from oracle.questions.cases import text_rows
    from oracle.verify import Extras, verify_other
    from oracle.verify import verify as run
    from oracle.verify_ranks import check_ranks, start_ranks, verify_ranks
    from oracle.verify_speculation import verify_speculation

    in_type = None if dtype is None else dtype_named(dtype, ("float32", "bfloat16"))
    writable(json, html)
    spelled = Words(encoding or "dense", compile, fused, cache, projections, cache_bits)
    plan = spelled.plan()  # which refuses what it cannot be
    if subject != "ours" and (plan != Words("dense").plan() or encoding or draft or rung or ranks or adapter):
        flags = "--adapter, --encoding, --compile, --fused, --cache, --cache-bits, --projections, --rung, --ranks and --draft"
        raise ValueError(f"{flags} are for our own models, not for {subject!r}")
    on = where(device)
    if fused and on.type != "cuda":
        raise ValueError("--fused needs a CUDA device: on a CPU judge --compile")
    proposed: Plan | None = None
    of_rung: int | None = None
    if rung is not None:
        if plan != Words(encoding or "dense").plan() or encoding or draft:
            raise ValueError("--rung says what the plan and its draft are: leave the other flags")
        plan, proposed, of_rung = rung_plans(rung, on)
    place = Place.of_environment()
    if of_rung is not None and stages == 1:
        stages = of_rung or (ranks or 1 if place is None else place.size)
    if of_rung is not None and not ranks and place is None:
        raise ValueError(f"--rung {rung} is for several processes: say --ranks 2, or start them with torchrun")
    if cache_bits and (ranks or of_rung is not None or place is not None):
        raise ValueError("--cache-bits is asked of one process: leave --ranks")
    if cache_bits and draft:
        raise ValueError("--cache-bits is asked without a draft: rounding keys is a step function, and texts may part")
    if ranks is not None and place is None:
        check_ranks(resolve(model).open(), ranks, stages)
        raise typer.Exit(start_ranks(ranks, sys.argv[1:]))
    if stages != 1 and place is None:
        raise ValueError(
            f"--stages {stages}: it takes several processes: say --ranks {2 * stages}, or start them with torchrun"
        )
    in_type = in_type or default_dtype(on)
    other = None if text is None else text.read_text(encoding="utf-8")
    found = resolve(model)
    checkpoint = found.open(on, in_type, adapter)
    tokenizer = found.tokenizer() if found.has_tokenizer else None
    encode = None if tokenizer is None else tokenizer.encode
    if subject != "ours":
        other_subject = other_named(subject, found, checkpoint.config.vocab_size, in_type, on)
        finish(verify_other(other_subject, checkpoint, on, encode, model, say), json, html)
    if rung is None:
        spelled = replace(spelled, encoding=chosen_encoding(encoding, checkpoint, fused).name)
        plan = spelled.plan()
    if place is not None and subject == "ours":
        if draft is not None or proposed is not None:
            raise ValueError("--draft is asked of one process")
        of_rank = verify_ranks(checkpoint, plan, join(on, stages=stages), in_type, encode, model, say)
        finish(of_rank, json, html, quiet=of_rank.rank > 0)
    words = ["--model", model, "--device", on.type, "--dtype", str(in_type)[6:], "--plan", dumps(asdict(spelled))]
    words += [] if adapter is None else ["--adapter", adapter]
    extras = Extras(
        tokenizer=tokenizer,
        text=other,
        again=words,
        repeat=rung is None and not compile,
    )
    prompts = text_rows(encode, [7, 12]) if encode is not None else ()
    proposers = proposers_named(draft, draft_encoding, speculate, plan, on, checkpoint.config, prompts)
    if proposed is not None:
        proposers = proposers_of(checkpoint, proposed, on)
    name = model if adapter is None else f"{model} with {adapter}"
    certificate = run(checkpoint, plan, on, in_type, encode, name, say, extras)
    if proposers is not None:
        verify_speculation(certificate, checkpoint, plan, on, in_type, proposers, prompts, say)
    finish(certificate, json, html)


@app.command("record-cases")
def record_cases(
    model: ModelFlag = "smollm2-135m",
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("cases.json"),
) -> None:
    """Write the tokens that another engine is to be judged on."""
    from llama_ref.models import resolve
    from oracle.questions.cases import standard_case
    from oracle.questions.recorded import Cases

    writable(out)
    found = resolve(model)
    config = found.open().config
    case = standard_case(config.vocab_size, config.max_context, texts(found))
    out.write_text(Cases.of(case, model, config.vocab_size).to_json(), encoding="utf-8")
    rows = ", ".join(f"row.{i} [{len(row)}, {config.vocab_size}]" for i, row in enumerate(case.rows))
    print(f"{out}: write the logits of these rows to a .safetensors file: {rows}")


@app.command("judge")
def judge_file(
    cases: Annotated[Path, typer.Option(help="what record-cases wrote")],
    logits: Annotated[Path, typer.Option(help=".safetensors with row.0, row.1, ... [T, V]; greedy.0, ... [n]")],
    model: Annotated[str | None, typer.Option(help="the model; by default the one named in the cases")] = None,
    device: DeviceFlag = None,
    dtype: Annotated[
        str | None, typer.Option(help="the arithmetic's type: float32, bfloat16 or float16; by default the logits' own")
    ] = None,
    json: JsonFlag = None,
    html: HtmlFlag = None,
) -> None:
    """Judge logits that were computed elsewhere, and if they are there, greedy tokens and stages."""
    from llama_fast.devices import where
    from llama_ref.models import resolve
    from oracle.questions.recorded import Cases, Recorded, check_stages, judge_recorded, traces
    from oracle.report.certificate import Certificate
    from oracle.subjects.adapters import stage_widths
    from oracle.verify import add_stages, bench_for, subject_of

    writable(json, html)
    in_type = None if dtype is None else dtype_named(dtype, ("float32", "bfloat16", "float16"))
    asked, recorded = Cases.read(cases), Recorded.read(logits)
    in_type, on = in_type or recorded.dtype, where(device)
    checkpoint = resolve(model or asked.model).open(device=on, dtype=in_type)
    if checkpoint.config.vocab_size != asked.vocab_size:
        raise ValueError(f"{cases}: made for a vocabulary of {asked.vocab_size}, not {checkpoint.config.vocab_size}")
    if max(map(len, asked.rows), default=0) > checkpoint.config.max_context:
        raise ValueError(f"{cases}: a row exceeds the model's context of {checkpoint.config.max_context}")
    check_stages(logits, asked, recorded, stage_widths(checkpoint.config))
    certificate = Certificate(subject_of(model or asked.model, str(logits.name), None, on, in_type))
    bench = bench_for(checkpoint, in_type, on)
    certificate.parts.update(judge_recorded(bench, asked, recorded))
    certificate.positions[str(in_type)[6:]] = bench.curves
    if recorded.stages:
        add_stages(certificate, str(in_type)[6:], asked.rows, traces(asked, recorded), bench)
    if certificate.outcome is Outcome.DIFFER and dtype is None:
        told = f"judged as {str(in_type)[6:]}, the logits' own type: if the arithmetic was narrower, say --dtype"
        certificate.notes.append(told)
    finish(certificate, json, html)


def dtype_named(name: str, known: Sequence[str]) -> torch.dtype:
    import torch

    if name not in known:
        raise ValueError(f"unknown dtype {name!r} (known: {', '.join(known)})")
    found: torch.dtype = getattr(torch, name)
    return found


def texts(found: Model) -> Encode | None:
    """How a model's texts become ids, if it has a tokenizer."""
    return found.tokenizer().encode if found.has_tokenizer else None


def other_named(name: str, found: Model, vocab_size: int, dtype: torch.dtype, device: torch.device):  # type: ignore[no-untyped-def]
    """ "transformers" or "package.module:function" as a Subject."""
    from oracle.subjects.others import callable_named, open_transformers

    if name != "transformers":
        return callable_named(name, vocab_size, dtype, device)
    if found.path is None:
        raise ValueError("transformers reads files: a random model has none")
    return open_transformers(found.path, dtype, device)


def proposers_named(
    draft: str | None,
    encoding: str | None,
    k: int | None,
    target: Plan,
    device: torch.device,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
) -> Callable[[torch.dtype], list[Speculation]] | None:
    """What makes the proposers for a type of arithmetic; None where none is asked for. Those that could not serve a target of
    `config` after these prompts fail here, before the long run."""
    from llama_fast.build import build
    from llama_fast.recipes import encoding_named
    from llama_fast.speculative.proposers import Draft, Ngram
    from llama_ref.models import resolve
    from oracle.questions.speculation import check_draft

    if draft is None:
        if encoding is not None or k is not None:
            raise ValueError("--draft-encoding and --speculate say how tokens are proposed: --draft must say by whom")
        return None
    k = 5 if k is None else k
    ngram = Ngram(k)  # raises where k < 1
    if draft == "ngram":
        return lambda dtype: [ngram]
    found, kind = resolve(draft), encoding_named(encoding) if encoding else None
    check_draft(found.open(device).config, config, k, prompts)

    def of_type(dtype: torch.dtype) -> list[Speculation]:
        checkpoint = found.open(device, dtype)
        plan = replace(target, encoding=kind or encoding_named(checkpoint.encoding))
        return [Draft(build(checkpoint, plan, device, dtype), k)]

    return of_type


def proposers_of(
    checkpoint: Checkpoint, plan: Plan, device: torch.device
) -> Callable[[torch.dtype], list[Speculation]]:
    """A rung's own draft: the same weights under another plan."""
    from llama_fast.build import build
    from llama_fast.speculative.proposers import Draft

    return lambda dtype: [Draft(build(checkpoint, plan, device, dtype))]


def say(step: str) -> None:
    print(f"· {step}", file=sys.stderr, flush=True)


def finish(certificate: Certificate, json: Path | None, html: Path | None, quiet: bool = False) -> None:
    """Print and write (`quiet`: not of a rank that another one speaks for), end with the exit code."""
    if quiet:
        raise typer.Exit(0 if certificate.outcome is Outcome.AGREE else 1)
    print(certificate.to_text(), end="")
    if json is not None:
        json.write_text(certificate.to_json(), encoding="utf-8")
    if html is not None:
        from oracle.report.page import page

        html.write_text(page(certificate), encoding="utf-8")
    raise typer.Exit(0 if certificate.outcome is Outcome.AGREE else 1)


def main() -> None:
    """The command; what it could not run for becomes one line and exit code 2."""
    try:
        sys.exit(run(app))
    except Exception as error:  # whatever stopped it, no verdict was reached; LLAMA_FAST_TRACEBACK=1 shows where
        if os.environ.get("LLAMA_FAST_TRACEBACK"):
            raise
        complain(f"llama-oracle: {one_line(error)}")
        sys.exit(2)


if __name__ == "__main__":
    main()

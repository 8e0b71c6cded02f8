"""`llama-oracle verify`, `record-cases`, `judge`: exit 0 AGREE, 1 DIFFER or EMPTY, 2 could not run (one line on stderr)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_ref.command import complain, one_line, run, writable
from oracle.statistics.compare import Outcome

if TYPE_CHECKING:
    import torch

    from llama_fast.engine.speculation import Speculation
    from llama_fast.plan import Plan
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
    encoding: Annotated[
        str | None, typer.Option(help="how weights are stored; the checkpoint's own by default")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="judge the compiled phases")] = False,
    fused: Annotated[bool, typer.Option("--fused", help="judge our own kernels; needs a GPU")] = False,
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

    from llama_fast import recipes as presets
    from llama_fast.build import default_dtype, where
    from llama_ref.models import resolve
    from oracle.questions.cases import text_rows
    from oracle.verify import Extras, verify_other
    from oracle.verify import verify as run
    from oracle.verify_speculation import verify_speculation

    in_type = None if dtype is None else dtype_named(dtype, ("float32", "bfloat16"))
    writable(json, html)
    if fused and compile:
        raise ValueError("--fused and --compile are two ways to decode: choose one")
    if subject != "ours" and (fused or compile or encoding or draft):
        raise ValueError(f"--encoding, --compile, --fused and --draft are for our own models, not for {subject!r}")
    on = where(device)
    if fused and on.type != "cuda":
        raise ValueError("--fused needs a CUDA device: on a CPU judge --compile")
    in_type = in_type or default_dtype(on)
    other = None if text is None else text.read_text(encoding="utf-8")
    found = resolve(model)
    checkpoint = found.open(device=on, dtype=in_type)
    encode, witness = texts(found)
    if subject != "ours":
        other_subject = other_named(subject, found, checkpoint.config.vocab_size, in_type, on)
        finish(verify_other(other_subject, checkpoint, on, encode, model, say), json, html)
    kept = presets.chosen_encoding(encoding, checkpoint, fused)
    plan = presets.fused(kept) if fused else presets.optimised(kept, compile)
    words = ["--model", model, "--encoding", kept.name, "--device", on.type, "--dtype", str(in_type)[6:]]
    extras = Extras(
        tokenizer=found.tokenizer() if found.has_tokenizer else None,
        witness=witness,
        text=other,
        again=None if compile else [*words, *(["--fused"] if fused else [])],
    )
    prompts = text_rows(encode, [7, 12]) if encode is not None else ()
    proposers = proposers_named(draft, draft_encoding, speculate, plan, on, checkpoint.config, prompts)
    certificate = run(checkpoint, plan, on, in_type, encode, model, say, extras)
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
    case = standard_case(config.vocab_size, config.max_context, texts(found)[0])
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
    from llama_fast.build import where
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


def texts(found: Model) -> tuple[Encode | None, Encode | None]:
    """How a model's texts become ids: by its tokenizer, and by an independent reader of the same directory, if any."""
    if not found.has_tokenizer:
        return None, None
    ours = found.tokenizer().encode
    assert found.path is not None
    if not (found.path / "tokenizer.json").is_file():
        return ours, None
    from transformers import AutoTokenizer

    try:
        return ours, AutoTokenizer.from_pretrained(found.path).encode
    except (ImportError, OSError, ValueError, RuntimeError) as error:  # a witness may want packages of its own
        typer.echo(
            f"· no witness for ids: {(str(error).strip().splitlines() or ['transformers has none'])[0]}", err=True
        )
        return ours, None


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


def say(step: str) -> None:
    print(f"· {step}", file=sys.stderr, flush=True)


def finish(certificate: Certificate, json: Path | None, html: Path | None) -> None:
    """Print, write, end with the exit code."""
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

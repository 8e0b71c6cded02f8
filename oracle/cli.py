"""`llama-oracle verify`: exit 0 AGREE, 1 DIFFER or EMPTY, 2 could not run (one line on stderr)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oracle.compare import Outcome

if TYPE_CHECKING:
    import torch

    from llama_fast.plan import Plan
    from llama_fast.speculation import Speculation

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _group() -> None:
    """Judge a fast Llama against the reference: float64 truth, budgets from the reference's own rounding."""


@app.command()
def verify(
    model: Annotated[
        str, typer.Option(help="directory, GGUF file, hub id, smollm2-135m or random:NAME[:SEED]")
    ] = "smollm2-135m",
    encoding: Annotated[
        str | None, typer.Option(help="how weights are stored; the checkpoint's own by default")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="judge the compiled phases")] = False,
    draft: Annotated[
        str | None, typer.Option(help="judge speculation too: a model with the same vocabulary, or ngram")
    ] = None,
    draft_encoding: Annotated[str | None, typer.Option(help="how the draft's weights are stored")] = None,
    speculate: Annotated[int, typer.Option(help="tokens proposed in a round")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16")] = None,
    json: Annotated[Path | None, typer.Option(help="write the certificate here")] = None,
) -> None:
    """Judge prefill, decoding, greedy tokens and every stage of a model; for a lossy encoding also its cost."""
    import torch

    from llama_fast.build import default_dtype, where
    from llama_fast.presets import encoding_named, optimised
    from llama_ref.models import resolve
    from oracle.cases import text_rows
    from oracle.speculation import verify_speculation
    from oracle.verify import verify as run

    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype is not None and dtype not in named:
        raise ValueError(f"unknown dtype {dtype!r} (known: {', '.join(named)})")
    if json is not None and not json.parent.is_dir():
        raise ValueError(f"{json.parent}: no such directory, the certificate could not be written")
    on = where(device)
    in_type = default_dtype(on) if dtype is None else named[dtype]
    found = resolve(model)
    checkpoint = found.open(device=on, dtype=in_type)
    plan = optimised(encoding_named(encoding or checkpoint.encoding), compile)
    encode = found.tokenizer().encode if found.has_tokenizer else None
    proposers = proposers_named(draft, draft_encoding, speculate, plan, on)
    said = partial(print, "·", file=sys.stderr, flush=True)
    certificate = run(checkpoint, plan, on, in_type, encode, model, said)
    if proposers is not None:
        prompts = text_rows(encode, [7, 12]) if encode is not None else ()
        verify_speculation(certificate, checkpoint, plan, on, in_type, proposers, prompts, said)
    print(certificate.to_text(), end="")
    if json is not None:
        json.write_text(certificate.to_json(), encoding="utf-8")
    raise typer.Exit(0 if certificate.outcome is Outcome.AGREE else 1)


def proposers_named(
    draft: str | None, encoding: str | None, k: int, target: Plan, device: torch.device
) -> Callable[[torch.dtype], list[Speculation]] | None:
    """What makes the proposers for a type of arithmetic; None where none is asked for. Impossible ones fail here."""
    from llama_fast.build import build
    from llama_fast.optimisations.speculative import Draft, Ngram
    from llama_fast.presets import encoding_named
    from llama_ref.models import resolve

    if draft is None:
        if encoding is not None:
            raise ValueError("--draft-encoding says how proposals are computed: --draft must say by whom")
        return None
    if draft == "ngram":
        ngram = Ngram(k)
        return lambda dtype: [ngram]
    found, kind = resolve(draft), encoding_named(encoding) if encoding else None

    def of_type(dtype: torch.dtype) -> list[Speculation]:
        checkpoint = found.open(device, dtype)
        plan = replace(target, encoding=kind or encoding_named(checkpoint.encoding))
        return [Draft(build(checkpoint, plan, device, dtype), k)]

    return of_type


def main() -> None:
    """The command; what it could not run for becomes one line and exit code 2."""
    try:
        app()
    except Exception as error:  # whatever stopped it, no verdict was reached; LLAMA_FAST_TRACEBACK=1 shows where
        if os.environ.get("LLAMA_FAST_TRACEBACK"):
            raise
        print(f"llama-oracle: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""`llama-oracle verify`: exit 0 AGREE, 1 DIFFER or EMPTY, 2 could not run (one line on stderr)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from oracle.compare import Outcome

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
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16")] = None,
    json: Annotated[Path | None, typer.Option(help="write the certificate here")] = None,
) -> None:
    """Judge prefill, decoding, greedy tokens and every stage of a model; for a lossy encoding also its cost."""
    import torch

    from llama_fast.build import default_dtype, where
    from llama_fast.presets import encoding_named, optimised
    from llama_ref.models import resolve
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
    certificate = run(
        checkpoint, plan, on, in_type, encode, model, lambda step: print(f"· {step}", file=sys.stderr, flush=True)
    )
    print(certificate.to_text(), end="")
    if json is not None:
        json.write_text(certificate.to_json(), encoding="utf-8")
    raise typer.Exit(0 if certificate.outcome is Outcome.AGREE else 1)


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

"""What each encoding loses on the default model: the table of docs/quality.md, as rows of a record of docs/measurements.

    python -m tests.instruments.quality --out quality.json [--rows "int8,int4-g32 nearest"] [--tokens 4096]

A row is measured once: what `--out` holds already is kept, so a run that was ended goes on where it stopped.

The held-out text has 4,096 positions: ten rows of 256 tokens of the oracle's prose (the opening of Alice's Adventures in
Wonderland, in the public domain) and six of Python's language reference, as the module `pydoc_data.topics` of every CPython has
it (PSF licence): every fourth topic. The calibration text is the other topics. So six rows are of its kind, ten of another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fast.calibration.fitting import Fit
from llama_fast.calibration.rounding import round_alone
from llama_fast.contracts import Encoding
from llama_fast.ladder.quality import HeldOut, drift_of, in_memory
from llama_fast.ladder.quantizing import Text, fitted, nearest, with_head
from llama_fast.recipes import encoding_named
from llama_ref.checkpoint import Checkpoint
from llama_ref.models import DEFAULT_MODEL, resolve
from llama_ref.tokenizers.contract import Tokenizer
from oracle.questions.cases import TEXT
from oracle.statistics.drift import Drift, Tally

LENGTH, PROSE_ROWS, REFERENCE_ROWS = 256, 10, 6
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One line of the table. `head`: the head's own encoding; `fit`: nearest, searched, weighted or feedback.

    "searched" is the search for scales of "weighted" without a text: an error costs the same in every column.
    """

    encoding: str
    fit: str = "nearest"
    head: str = "int8"

    @property
    def name(self) -> str:
        """ "int4-g32 feedback", "int4-g32 nearest (own head)"."""
        own = self.head == self.encoding and self.encoding not in ("int8", "dense")
        return f"{self.encoding} {self.fit}" + (" (own head)" if own else "")


ROWS = (
    Row("dense", head="dense"),
    Row("int8"),
    Row("fp8"),
    Row("fp8", "feedback"),
    Row("int4-g64"),
    Row("int4-g64", "weighted"),
    Row("int4-g64", "feedback"),
    Row("int4-g32"),
    Row("int4-g32", "searched"),
    Row("int4-g32", "weighted"),
    Row("int4-g32", "feedback"),
    Row("int4-g64-zero"),
    Row("int4-g32-zero"),
    Row("int4-g32-zero", "weighted"),
    Row("int4-g32-zero", "feedback"),
    Row("sparse24"),
    Row("sparse24", "weighted"),
    Row("sparse24", "feedback"),
    Row("sparse24-int8"),
    Row("sparse24-int8", "weighted"),
    Row("sparse24-int8", "feedback"),
    Row("int4-g32", "nearest", "int4-g32"),
    Row("int4-g32", "weighted", "int4-g32"),
)
"""The default model's 576 columns are no whole groups of 128, so int4 stands here in groups of 64. "dense" is run in bf16."""


def texts() -> tuple[str, str]:
    """(held-out, calibration): every fourth topic of the language reference by name, and the others."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    return "\n".join(topics[name] for name in names[::4]), "\n".join(
        topics[name] for i, name in enumerate(names) if i % 4
    )


def consecutive(ids: Sequence[int], rows: int) -> list[tuple[int, ...]]:
    """The first rows of LENGTH tokens; ValueError if there are fewer."""
    if len(ids) < rows * LENGTH:
        raise ValueError(f"{len(ids)} tokens are no {rows} rows of {LENGTH}")
    return [tuple(ids[i * LENGTH : (i + 1) * LENGTH]) for i in range(rows)]


def held_out_rows(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Ten rows of prose, then six of the language reference."""
    prose = consecutive(tokenizer.encode(TEXT.read_text(encoding="utf-8")), PROSE_ROWS)
    return prose + consecutive(tokenizer.encode(texts()[0]), REFERENCE_ROWS)


def tensors_of(row: Row, original: Checkpoint, text: Text) -> dict[str, Tensor]:
    kind = encoding_named(row.encoding)
    if row.fit == "nearest":
        return nearest(original, kind, CPU)
    if row.fit == "searched":
        return nearest(original, kind, CPU) | searched(original, kind)
    return fitted(Fit(original, kind, row.fit == "feedback", CPU, lambda line: print(f"  note: {line}")), text)


def searched(original: Checkpoint, kind: Encoding) -> dict[str, Tensor]:
    """The blocks' matrices with scales whose squared errors of the weights are least."""
    found: dict[str, Tensor] = {}
    for name, source in original.weights.items():
        if name.startswith("layers.") and len(source.shape) == 2:
            weight, alike = source[:].float(), torch.ones(source.shape[1])
            parts = round_alone(weight, alike, kind.grid(weight, alike, torch.bfloat16))  # type: ignore[attr-defined]
            found |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
    return found


def layer_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of the blocks' matrices, which is what the encodings differ in."""
    return sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("layers.") and "norm" not in name)


def as_numbers(drift: Drift) -> dict[str, Any]:
    return {name: asdict(getattr(drift, name)) for name in ("kld_mean", "top1_agreement", "perplexity_ratio")}


def measured(row: Row, original: Checkpoint, held: HeldOut, text: Text) -> dict[str, Any]:
    """One row: the drift of all, of the prose and of the reference; the seconds that the fit took."""
    head = None if row.head == row.encoding else encoding_named(row.head)
    original = original if row.encoding == "dense" else with_head(original, head, encoding_named(row.encoding))
    began = time.perf_counter()
    tensors = tensors_of(row, original, text)
    seconds = time.perf_counter() - began
    dtype = torch.bfloat16 if row.encoding == "dense" else torch.float32
    tallies: list[Tally] = held.tallies(in_memory(original, tensors, row.encoding), dtype)
    parts = {"all": tallies, "prose": tallies[:PROSE_ROWS], "reference": tallies[PROSE_ROWS:]}
    found: dict[str, Any] = {name: as_numbers(drift_of(part)) for name, part in parts.items()}
    weights = sum(
        source.shape[0] * source.shape[1]
        for name, source in original.weights.items()
        if name.startswith("layers.") and len(source.shape) == 2
    )
    bits = 16.0 if row.encoding == "dense" else 8 * layer_bytes(tensors) / weights
    return found | {"bits": bits, "seconds": seconds}


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the record's table."""

    def cell(part: str, statistic: str, digits: int) -> str:
        e = found[part][statistic]
        return f"{e['value']:.{digits}f} ({e['low']:.{digits}f}-{e['high']:.{digits}f})"

    cells = [
        name,
        f"{found['bits']:.2f}",
        cell("all", "kld_mean", 4),
        cell("all", "top1_agreement", 3),
        cell("all", "perplexity_ratio", 3),
        f"{found['prose']['kld_mean']['value']:.4f}",
        f"{found['reference']['kld_mean']['value']:.4f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = "| weights | bits a weight | KLD | top-1 | perplexity ratio | KLD of the prose | KLD of the reference |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that is written, and gone on with")
    parser.add_argument("--rows", help="names of rows, with commas between; all by default")
    parser.add_argument("--tokens", type=int, default=4096, help="of the calibration text")
    asked = parser.parse_args()
    by_name = {row.name: row for row in ROWS}
    wanted = [by_name[name] for name in asked.rows.split(",")] if asked.rows else list(ROWS)
    done: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    model = resolve(DEFAULT_MODEL)
    original, tokenizer = model.open(), model.tokenizer()
    file = asked.out.with_suffix(".calibration.txt")
    file.write_text(texts()[1], encoding="utf-8")
    text = Text.of(file, tokenizer, asked.tokens, original.config.max_context)
    held: HeldOut | None = None
    for row in wanted:
        if row.name in done:
            continue
        held = held or HeldOut.of(original, held_out_rows(tokenizer), CPU)
        done[row.name] = measured(row, original, held, text)
        asked.out.write_text(json.dumps(done, indent=1))
        print(line(row.name, done[row.name]), flush=True)
    print(f"\n{HEAD}")
    for row in ROWS:
        if row.name in done:
            print(line(row.name, done[row.name]))
    sha = {
        name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in zip(("held out", "calibration"), texts())
    }
    print(
        f"\nPython {platform.python_version()}, torch {version('torch')}; {text.tokens.numel()} calibration tokens; {sha}"
    )


if __name__ == "__main__":
    main()

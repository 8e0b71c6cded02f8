"""Logits from elsewhere, judged off-line: a file of tokens goes out, a file of logits comes back.

`llama-oracle record-cases` writes the tokens as JSON, for another engine, another machine or a colleague to run:

    {"schema": "llama-oracle-cases/1", "model": "smollm2-135m", "vocab_size": 49152,
     "rows": [[504, 3, ...], [...]],                 logits are wanted at every position of these
     "prompts": [[504, 3, ...]], "new_tokens": 24}   and, if they can be had, greedy continuations of these

What comes back is a `.safetensors` file of tensors by these names; all but the first kind may be absent:

    row.0, row.1, ...       [T, V] logits or log-probabilities (a constant per position does not count)
    greedy.0, greedy.1 ...  [n] the continuation's token ids
    row.0.layers.3          [T, D] the residual stream after block 3, or any other stage under the reference's names:
                            with these a DIFFER is traced to its block. Each is judged over the rows that show it
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from oracle.questions.cases import Case
from oracle.questions.judge import Bench
from oracle.statistics.compare import Check, Verdict, compare_logits, empty
from oracle.statistics.greedy import Continuation, compare_greedy
from oracle.subjects.subject import Trace

SCHEMA = "llama-oracle-cases/1"
NAME = re.compile(r"(row|greedy)\.(\d+)(?:\.(.+))?")


class FileError(ValueError):
    """A file of cases or logits that cannot be used as it stands; the message is one line and names the file."""


@dataclass(frozen=True)
class Cases:
    """What another engine is asked: rows to be scored, prompts to be continued greedily."""

    model: str
    vocab_size: int
    rows: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...] = ()
    new_tokens: int = 0

    @classmethod
    def of(cls, case: Case, model: str, vocab_size: int) -> Cases:
        return cls(model, vocab_size, case.rows, case.prompts, case.new_tokens)

    def to_json(self) -> str:
        rows, prompts = ([list(row) for row in part] for part in (self.rows, self.prompts))
        document = {"schema": SCHEMA, "model": self.model, "vocab_size": self.vocab_size}
        return json.dumps(document | {"rows": rows, "prompts": prompts, "new_tokens": self.new_tokens}) + "\n"

    @classmethod
    def read(cls, path: Path) -> Cases:
        """Raises FileError for what is not such a file; an empty list of rows is one (and its verdict EMPTY)."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FileError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise FileError(f"{path}: not JSON, or cut short ({error})") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise FileError(f"{path}: not a file of cases: its schema is not {SCHEMA!r}")
        vocabulary = data.get("vocab_size")
        if not isinstance(vocabulary, int) or vocabulary < 1:
            raise FileError(f"{path}: vocab_size={vocabulary!r} must be a positive whole number")
        rows, prompts = (_rows(data.get(part, []), part, vocabulary, path) for part in ("rows", "prompts"))
        new = data.get("new_tokens", 0)
        if not isinstance(new, int) or new < 0:
            raise FileError(f"{path}: new_tokens={new!r} must be a whole number")
        return cls(str(data.get("model", "")), vocabulary, rows, prompts, new)


def _rows(found: object, part: str, vocabulary: int, path: Path) -> tuple[tuple[int, ...], ...]:
    if not isinstance(found, list):
        raise FileError(f"{path}: {part} must be a list of lists of token ids")
    for i, row in enumerate(found):
        if not isinstance(row, list) or not row:
            raise FileError(f"{path}: {part}[{i}] is not a list of token ids")
        strange = [t for t in row if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t < vocabulary]
        if strange:
            raise FileError(f"{path}: {part}[{i}] holds {strange[0]!r}, no id of a vocabulary of {vocabulary}")
    return tuple(tuple(row) for row in found)


@dataclass(frozen=True)
class Recorded:
    """A file of logits: per row its logits and the stages shown, per prompt its continuation."""

    logits: dict[int, Tensor] = field(default_factory=dict)
    greedy: dict[int, list[int]] = field(default_factory=dict)
    stages: dict[int, Trace] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The type the logits were written in: a first guess at that of the arithmetic."""
        return next(iter(self.logits.values())).dtype if self.logits else torch.float32

    @classmethod
    def read(cls, path: Path) -> Recorded:
        """Raises FileError for what is no safetensors file, is cut short, or holds other names."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise FileError(f"{path}: no such file")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise FileError(f"{path}: not a whole safetensors file ({error})") from error
        found = cls()
        for name, tensor in sorted(tensors.items()):
            told = NAME.fullmatch(name)
            if told is None or (told[1] == "greedy" and told[3]):
                raise FileError(f"{path}: tensor {name!r} is neither row.N, row.N.STAGE nor greedy.N")
            index, dimensions = int(told[2]), 1 if told[1] == "greedy" else 2
            if tensor.dim() != dimensions or tensor.is_floating_point() != (told[1] == "row"):
                wanted = "[T, V] of a floating type" if told[1] == "row" else "[n] of whole numbers"
                raise FileError(f"{path}: {name} is {list(tensor.shape)} of {tensor.dtype}, not {wanted}")
            if told[1] == "greedy":
                found.greedy[index] = tensor.tolist()
            elif told[3]:
                found.stages.setdefault(index, {})[told[3]] = tensor
            else:
                found.logits[index] = tensor
        return found


def judge_recorded(bench: Bench, cases: Cases, recorded: Recorded) -> dict[str, Verdict]:
    """Logits of all rows, and greedy tokens where there are any. A row that is missing is DIFFER, no rows is EMPTY."""
    if not cases.rows:
        return {"logits": empty("rows", "the list of cases is empty")}
    extra = sorted(set(recorded.logits) - set(range(len(cases.rows))))
    missing = [row for row in range(len(cases.rows)) if row not in recorded.logits]
    if extra or missing:
        told = [f"row.{row} is missing" for row in missing] + [f"row.{row} was not asked for" for row in extra]
        return {"logits": Verdict((Check("rows", 1.0, 0.0, ", ".join(told)),))}
    known = bench.of(cases.rows)
    found = [recorded.logits[row] for row in range(len(cases.rows))]
    parts = {
        "logits": compare_logits(found, [t for t, _ in known], [y for _, y in known], bench.unit, None, bench.factors)
    }
    if recorded.greedy:
        parts["greedy"] = _greedy(bench, cases, recorded.greedy)
    return parts


def _greedy(bench: Bench, cases: Cases, greedy: dict[int, list[int]]) -> Verdict:
    wrong = [
        f"greedy.{i} holds {len(tokens)} tokens, asked were {cases.new_tokens} after prompt {i} of {len(cases.prompts)}"
        for i, tokens in sorted(greedy.items())
        if i >= len(cases.prompts) or len(tokens) != cases.new_tokens
    ]
    strange = [token for tokens in greedy.values() for token in tokens if not 0 <= token < cases.vocab_size]
    if wrong or strange:
        told = wrong[0] if wrong else f"{strange[0]} is outside the vocabulary of {cases.vocab_size}"
        return Verdict((Check("tokens", 1.0, 0.0, told),))
    order = sorted(greedy)
    known = bench.of([[*cases.prompts[i], *greedy[i]] for i in order])
    runs = []
    for i, (truth, plain) in zip(order, known, strict=True):
        at = slice(len(cases.prompts[i]) - 1, -1)
        runs.append(Continuation(greedy[i], None, truth[at], plain[..., at, :]))
    return compare_greedy(runs, bench.unit, bench.factors)


def check_stages(path: Path, cases: Cases, recorded: Recorded, widths: Mapping[str, int]) -> None:
    """Raise FileError for a stage that cannot be judged: a name the reference has not, a row not asked for, a wrong shape.

    `widths`: how many features each of the reference's stages has.
    """
    for row, trace in sorted(recorded.stages.items()):
        for stage, value in trace.items():
            name = f"row.{row}.{stage}"
            if row >= len(cases.rows):
                raise FileError(f"{path}: {name}: {len(cases.rows)} rows were asked for")
            if stage not in widths:
                raise FileError(f"{path}: {name}: the reference has no stage {stage!r}")
            wanted = [len(cases.rows[row]), widths[stage]]
            if list(value.shape) != wanted:
                raise FileError(f"{path}: {name} is {list(value.shape)}, not {wanted}")


def traces(cases: Cases, recorded: Recorded) -> list[Trace]:
    """What is shown of every row's stages, its logits among them; nothing of a row that shows no other stage."""
    shown: list[Trace] = []
    for row in range(len(cases.rows)):
        logits = {"logits": recorded.logits[row]} if row in recorded.logits else {}
        shown.append(recorded.stages[row] | logits if row in recorded.stages else {})
    return shown

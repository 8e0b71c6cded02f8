"""Write docs/measurements.md, docs/quality.md and README's table from the records: `python docs/measurements_page.py`.

The records are docs/measurements/*.toml, a file a day (or a subject of a day). A record is one question that was put to a
machine, and its answer:

    [[record]]
    name = "h100-ladder"                      # by this name the tables refer to it
    date = 2026-11-24
    question = "How far does each rung get on an H100?"
    machine = "one H100"                      # a name of machines.toml
    commit = "2fc50e4"
    command = "`llama-fast bench`"
    answer = "The answer, with its figures."
    values = "a table: its first column names a value, the heads of the others say of what kind it is and its unit"
    notes = "What else was seen."

Records stand on the page from the newest day to the oldest, those of a day in the order of their file. The tables that are made
from records are templates: `{h100-ladder: fused: tokens/s}` is the number in that record's row and column, and a line
`{table: quality}` all values of that record.
"""

from __future__ import annotations

import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
RECORDS = HERE / "measurements"
PAGE, QUALITY, README = HERE / "measurements.md", HERE / "quality.md", HERE.parent / "README.md"
WIDTH = 120
BEGIN, END = "<!-- reached: made by docs/measurements_page.py -->", "<!-- /reached -->"
REFERENCE = re.compile(r"\{([^:{}]+): ([^:{}]+): ([^:{}]+)\}")
TABLE = re.compile(r"^\{table: ([^{}]+)\}$", re.M)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?x?")

INTRODUCTION = """
Every figure of README's table comes from a record on this page, and so do the figures of the other pages, with two
exceptions. Predictions (scaling.md, the table of k in speculation.md) are arithmetic on such records. The steps "seen" in
performance.md's tables of changes and ideas, where they do not recur here, were read off between two changes, on one H100 or
on CPUs on 2026-11-23 and 24, and their commands were not kept.

A record says the date, the question, the answer, and the machine, the commit and the command that gave it. Paths and module
names in a command are those of its commit. Unless a record says otherwise, one text is generated greedily: on a GPU
`random:llama-2-7b`, a prompt of 6 tokens and 200 new ones; on a CPU the default model smollm2-135m, a prompt of 5 tokens and
200 new ones; 5 samples. Tokens/s are new tokens over the wall time of prefill and decode, without compilation: the median,
and in brackets the least and the most of the samples. GB = 1e9 bytes. AGREE is the oracle's verdict on the very rung.

`docs/measurements_page.py` makes this page, quality.md and README's table from the records in `docs/measurements/`.
"""


@dataclass(frozen=True)
class Record:
    """One question and its answer. `values` is a Markdown table without its line of dashes, or nothing."""

    name: str
    date: str
    question: str
    machine: str
    commit: str
    command: str
    answer: str
    values: str = ""
    notes: str = ""

    def cell(self, row: str, column: str) -> str:
        """The text of `values` in the row whose first cell is `row`, under the head `column`; KeyError if there is none."""
        head, *rows = [
            [cell.strip() for cell in line.strip()[1:-1].split("|")] for line in self.values.strip().splitlines()
        ]
        found = [cells[head.index(column)] for cells in rows if column in head and cells[0] == row]
        if len(found) != 1:
            raise KeyError(f"record {self.name}: {len(found)} values in row {row!r}, column {column!r}")
        return found[0]


def records() -> list[Record]:
    """All of them, the newest day first. ValueError if two have one name, or a machine is not described."""
    found = [
        Record(**{key: str(value) for key, value in entry.items()})
        for path in sorted(RECORDS.glob("*.toml"))
        for entry in read(path).get("record", [])
    ]
    names = [record.name for record in found]
    if len(set(names)) < len(names):
        raise ValueError(f"records of one name: {sorted({name for name in names if names.count(name) > 1})}")
    unknown = {record.machine for record in found} - machines().keys()
    if unknown:
        raise ValueError(f"machines.toml does not describe {sorted(unknown)}")
    return sorted(found, key=age)  # stable: a day keeps its file's order


def age(record: Record) -> tuple[int, bool]:
    """To sort by: the newest day first, "before" a day behind that day."""
    return -int(record.date.removeprefix("before ").replace("-", "")), record.date.startswith("before")


def machines() -> dict[str, str]:
    """What each machine is, by the name that the records use."""
    described: dict[str, str] = read(RECORDS / "machines.toml")["machine"]
    return described


def read(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return told


def page(found: list[Record]) -> str:
    """docs/measurements.md."""
    parts = ["# Measurements", wrapped(INTRODUCTION)]
    for record in found:
        parts += [f"## {record.date}: {record.question}", wrapped(record.answer)]
        if record.values:
            parts.append(table(record))
        if record.notes:
            parts.append(wrapped(record.notes))
        parts.append(
            wrapped(f"*{record.machine[:1].upper()}{record.machine[1:]}; at {record.commit}; {record.command}*")
        )
    parts += ["## The machines", wrapped("\n\n".join(f"- **{name}**: {text}" for name, text in machines().items()))]
    return "\n\n".join(parts) + "\n"


def table(record: Record) -> str:
    """The values with their line of dashes."""
    head, *rows = record.values.strip().splitlines()
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])


def wrapped(text: str) -> str:
    """Paragraphs in lines of one length; a command, whole words as they are, may reach beyond it."""
    lines = [
        textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)
        for paragraph in text.strip().split("\n\n")
    ]
    return "\n\n".join(lines).replace("\n\n- ", "\n- ")


def number(text: str) -> str:
    """The first number of a cell, a ratio with its x: "**710.1** (705.9-710.4)" -> "710.1"."""
    found = NUMBER.search(text)
    if found is None:
        raise ValueError(f"no number in {text!r}")
    return found[0]


def filled(template: str, found: list[Record]) -> str:
    """`template` with a number for each reference. KeyError if a reference names no value."""
    by_name = {record.name: record for record in found}
    return REFERENCE.sub(lambda match: number(by_name[match[1]].cell(match[2], match[3])), template)


def reached(found: list[Record]) -> str:
    """README's table of what is reached."""
    return filled((RECORDS / "reached.md").read_text(encoding="utf-8"), found).strip()


def quality(found: list[Record]) -> str:
    """docs/quality.md."""
    by_name = {record.name: record for record in found}
    template = (RECORDS / "quality.md").read_text(encoding="utf-8")
    return filled(TABLE.sub(lambda match: table(by_name[match[1]]), template), found)


def with_table(readme: str, table: str) -> str:
    """README with the part between its two marks replaced."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def scaling_rows(found: list[Record]) -> dict[tuple[str, str, str, int], float]:
    """What `llama_fast.ladder.scaling.ROWS` must hold: tokens/s by system, shape, encoding and ranks."""
    rows = read(RECORDS / "scaling_rows.toml")["rows"]
    return {(*row[:3], row[3]): float(filled(row[4], found).replace(",", "")) for row in rows}


def main() -> None:
    found = records()
    PAGE.write_text(page(found), encoding="utf-8")
    QUALITY.write_text(quality(found), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), reached(found)), encoding="utf-8")


if __name__ == "__main__":
    main()

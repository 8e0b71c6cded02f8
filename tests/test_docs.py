"""What the pages say, runs: the library guide's examples, and the names of every command and flag."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llama_fast import Llama
from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.tokenizer import RandomTokenizer

DOCS = Path(__file__).parents[1] / "docs"
PYTHON = re.compile(r"```python\n(.*?)```", re.S)


def test_the_guides_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(48, 2, 6, 2, 10, 72, 259, 1024, eos_ids=(7,))
    tokenizer = RandomTokenizer(259, None, ())
    save_checkpoint(tmp_path / "model", config, random_checkpoint(config, 3).weights, tokenizer=tokenizer)
    original = Llama.from_pretrained.__func__  # type: ignore[attr-defined]
    tiny = classmethod(lambda cls, model, **options: original(cls, tmp_path / "model", **options))
    monkeypatch.setattr(Llama, "from_pretrained", tiny)
    blocks = PYTHON.findall((DOCS / "library.md").read_text())
    assert len(blocks) >= 8
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"library.md, block {number + 1}", "exec"), names)
    assert len(names["outputs"]) == 3 and names["chat"].reused_tokens > 0
    assert len(names["told"].logprobs) == names["told"].generated_tokens
    assert capsys.readouterr().out


def commands() -> dict[str, set[str]]:
    """Each command of the program, and its flags and arguments."""
    import typer.main

    from llama_fast.ladder.cli import app

    group: Any = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        found[name] = {flag for flag in flags if flag.startswith("--") and flag != "--help"}
    return found


def test_every_command_and_flag_has_its_line() -> None:
    sections = re.split(r"^## llama-fast ", (DOCS / "cli.md").read_text(), flags=re.M)[1:]
    told = {
        section.split("\n", 1)[0].split()[0]: set(re.findall(r"[|,] `(--[a-z-]+)`", section)) for section in sections
    }
    real = commands()
    assert told.keys() == real.keys()
    for name, flags in real.items():
        assert told[name] == flags, name

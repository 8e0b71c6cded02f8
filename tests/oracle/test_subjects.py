"""Subjects that are not ours, through the command: `transformers` on the same files, and any function."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llama_ref.checkpoint import Checkpoint, save_checkpoint
from llama_ref.model import Llama
from oracle import cli


@pytest.fixture
def model(tmp_path: Path, tiny: Checkpoint) -> str:
    save_checkpoint(tmp_path / "tiny", tiny.config, {name: source[:] for name, source in tiny.weights.items()}, "dense")
    return str(tmp_path / "tiny")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["llama-oracle", "verify", *words, "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("factor, code, told", [("1", 0, "AGREE"), ("1.001", 1, "DIFFER")])
def test_any_function_can_be_judged(
    factor: str,
    code: int,
    told: str,
    model: str,
    tiny: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    llama = Llama(tiny.config, tiny.weights, torch.float32)
    module = tmp_path / "somebodys.py"
    module.write_text(f"def logits(tokens_BT):\n    return model(tokens_BT) * {factor}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "somebodys", raising=False)
    import somebodys  # type: ignore[import-not-found]

    somebodys.model = llama
    assert run(monkeypatch, "--model", model, "--subject", "somebodys:logits") == code
    assert capsys.readouterr().out.rstrip().endswith(told)


@pytest.mark.parametrize(
    "words, told",
    [
        (("--subject", "nothing"), "none of ours, transformers, package.module:function"),
        (("--subject", "no_such_module:f"), "No module named 'no_such_module'"),
        (("--subject", "math:no_such_function"), "no_such_function"),
        (("--subject", "transformers", "--encoding", "int8"), "are for our own models"),
        (("--subject", "transformers", "--adapter", "lora"), "are for our own models"),
        (("--adapter", "no/such/lora"), "no/such/lora: no such directory"),
        (("--fused",), "--fused needs a CUDA device"),
        (("--fused", "--compile"), "choose one"),
        (("--text", "no/such/text"), "no/such/text"),
    ],
)
def test_what_cannot_be_judged_is_exit_2_and_one_line(
    words: tuple[str, ...], told: str, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--model", model, *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in err and err.count("\n") == 1

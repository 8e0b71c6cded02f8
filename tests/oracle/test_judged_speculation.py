"""`llama-oracle verify --draft`: the words, the parts of the certificate, and that a planted fault is found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_fast import checks
from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizer import RandomTokenizer
from oracle import cli, speculation

CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=101, max_context=256
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoint = random_checkpoint(CONFIG, 3)
    save_checkpoint(tmp_path / "model", CONFIG, dict(checkpoint.weights), tokenizer=RandomTokenizer(101, None, ()))
    return tmp_path / "model"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["llama-oracle", "verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_draft_is_judged(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    arguments = ("--model", model, "--json", file, "--speculate", 3)
    assert run(monkeypatch, *arguments, "--dtype", "bfloat16", "--draft", model, "--draft-encoding", "int8") == 0
    text = json.dumps(json.loads(file.read_text()))
    assert all(part in text for part in ("acceptance law", "float32 draft", "bfloat16 draft"))
    assert run(monkeypatch, *arguments, "--dtype", "float32", "--draft", "ngram") == 0

    def unverified(draft_BK: Tensor, best_BT: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([draft_BK, best_BT[:, -1:]], 1), torch.full_like(best_BT[:, 0], best_BT.shape[1])

    monkeypatch.setattr(checks, "accept_greedy", unverified)
    assert run(monkeypatch, *arguments, "--dtype", "float32", "--draft", "ngram") == 1


def test_a_wrong_law_of_acceptance_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speculation.judge_acceptance().outcome.value == "AGREE"
    accept = speculation.accept
    monkeypatch.setattr(speculation, "accept", lambda d, q, p, u: accept(d, q * 0.9, p, u))
    assert speculation.judge_acceptance().outcome.value == "DIFFER"


def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (("--draft", "ngram", "--speculate", 0), "k=0 must be at least 1"),
        (("--draft-encoding", "int8"), "--draft must say by whom"),
        (("--draft", "nobody"), "unknown model 'nobody'"),
    ):
        assert run(monkeypatch, "--model", model, *arguments) == 2
        err = capsys.readouterr().err.strip()
        assert message in err and len(err.splitlines()) == 1

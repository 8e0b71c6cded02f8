"""`llama-oracle verify --draft`: the words, the parts of the certificate, and that a planted fault is found."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.plan import Plan
from llama_fast.speculative import verification as checks
from llama_fast.speculative.proposers import Draft
from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.tokenizer import RandomTokenizer
from oracle import cli
from oracle.questions import speculation

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
    assert run(monkeypatch, *arguments, "--dtype", "bfloat16", "--draft", model, "--draft-encoding", "int4-g32") == 0
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


def saved(directory: Path, config: LlamaConfig) -> Path:
    tokenizer = RandomTokenizer(config.vocab_size, None, ())
    save_checkpoint(directory, config, dict(random_checkpoint(config, 4).weights), tokenizer=tokenizer)
    return directory


def test_mistakes_are_one_line_before_anything_is_judged(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_late(*_: object) -> None:
        raise AssertionError("the verification has begun")

    monkeypatch.setattr("oracle.verify.verify", too_late)
    other = saved(tmp_path / "other", dataclasses.replace(CONFIG, vocab_size=103))
    short = saved(tmp_path / "short", dataclasses.replace(CONFIG, max_context=79))
    for arguments, message in (
        (("--draft", "ngram", "--speculate", 0), "k=0 must be at least 1"),
        (("--draft", model, "--speculate", 0), "k=0 must be at least 1"),
        (("--draft", other), "the draft has a vocabulary of 103 tokens, the target one of 101"),
        (("--draft", short), "the draft's context of 79 is shorter than the 80 positions asked for"),
        (("--draft-encoding", "int8"), "--draft must say by whom"),
        (("--speculate", "4"), "--draft must say by whom"),
        (("--draft", "nobody"), "unknown model 'nobody'"),
    ):
        assert run(monkeypatch, "--model", model, *arguments) == 2
        err = capsys.readouterr().err.strip()
        assert message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("context", [80, 256])
@pytest.mark.parametrize("spare", [0, -1])
def test_a_draft_is_refused_where_it_could_not_serve(context: int, spare: int) -> None:
    k, prompts = 3, [[1, 2], [3, 4, 5, 6, 7, 8, 9]]
    target = random_checkpoint(dataclasses.replace(CONFIG, max_context=context), 3)
    wanted = min(7 + 64 + k, context)
    draft = random_checkpoint(dataclasses.replace(CONFIG, max_context=wanted + spare), 4)
    runners = [build(checkpoint, Plan(), "cpu", torch.float32) for checkpoint in (target, draft)]
    if spare < 0:
        for refused in (
            lambda: speculation.check_draft(draft.config, target.config, k, prompts),
            lambda: speculation.judge_speculation(runners[0], target, Draft(runners[1], k), prompts),
        ):
            with pytest.raises(ValueError, match=f"shorter than the {wanted} positions"):
                refused()
        return
    speculation.check_draft(draft.config, target.config, k, prompts)
    assert speculation.judge_speculation(runners[0], target, Draft(runners[1], k), prompts).outcome.value == "AGREE"

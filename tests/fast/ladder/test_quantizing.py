"""`llama-fast quantize` with a text and a head of its own: the directory loads, says what it is, and is judged."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from llama_fast.build import build
from llama_fast.plan import Plan
from llama_fast.recipes import encoding_named
from llama_ref.checkpoint import CheckpointError, open_checkpoint, random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.models import Model
from llama_ref.tokenizers.tokenizer import RandomTokenizer
from oracle.questions.cases import TEXT, standard_case
from oracle.questions.judge import Bench, judge
from oracle.subjects.fast import FastSubject
from oracle.verify import references
from tests.fast.ladder.conftest import Run

CONFIG = LlamaConfig(64, 2, 4, 2, 16, 96, 101, 192, eos_ids=(7,))


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = dataclasses.replace(CONFIG, tie_embeddings=request.param)
    weights = random_checkpoint(config, 3).weights
    save_checkpoint(tmp_path / "model", config, dict(weights), tokenizer=RandomTokenizer(101, None, ()))
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i * 7 % 26) for i in range(3000)), encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.mark.parametrize(("encoding", "fit"), [("int4-g32", "feedback"), ("sparse24-int8", "weighted")])
def test_a_calibrated_directory_loads_says_what_it_is_and_agrees(
    run: Run, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, fit: str
) -> None:
    monkeypatch.setattr(Model, "has_tokenizer", True)  # bytes as ids, so that there is a loss to tell
    out = tmp_path / "small"
    words = ("--encoding", encoding, "--head", "int8", "--calibrate", text, "--fit", fit, "--calibrate-tokens", 2000)
    code, told, _ = run("quantize", "--model", model, "--out", out, *words)
    stem = "tok_embeddings" if open_checkpoint(model).config.tie_embeddings else "output"
    assert code == 0 and told.splitlines()[-1].startswith(f"{out}: {encoding}, {stem} int8, 0.000 GB")
    for line in ("Rounded to the nearest", f"Fitted to {text}, {fit}"):
        assert re.search(rf"^{re.escape(line)}: KLD .+\], top-1 .+\], perplexity x.+\]$", told, re.M), told
    checkpoint = open_checkpoint(out)
    assert (checkpoint.encoding, checkpoint.encodings) == (encoding, {stem: "int8"})
    assert checkpoint.weights[f"{stem}.weight"].dtype is torch.int8
    runner = build(checkpoint, Plan(encoding_named(encoding)), "cpu", torch.float32)
    case = standard_case(CONFIG.vocab_size, CONFIG.max_context)
    assert judge(FastSubject(runner), Bench(*references(runner, checkpoint)), case).outcome.value == "AGREE"


def test_without_a_text_it_is_rounded_to_the_nearest(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    code, told, err = run("quantize", "--model", model, "--out", out, "--encoding", "int4-g32-zero")
    assert code == 0 and len(told.splitlines()) == 1
    assert err == "note: the loss is not measured: no tokenizer says what text means to this model\n"
    original, found = open_checkpoint(model), open_checkpoint(out)
    assert "encodings" not in json.loads((out / "config.json").read_text())["llama_fast"]
    kind, stem = encoding_named("int4-g32-zero"), "layers.1.feed_forward.w2"
    parts = kind.encode(original.weights[f"{stem}.weight"][:], torch.float32)
    assert all(torch.equal(found.weights[f"{stem}.{part}"][:], tensor) for part, tensor in parts.items())


def test_values_of_2_to_4_take_sixteen_bits_from_a_float32_source_too(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert run("quantize", "--model", model, "--out", out, "--encoding", "sparse24", "--no-measure")[0] == 0
    assert open_checkpoint(out).weights["layers.0.attention.wo.weight"].dtype is torch.bfloat16


def test_a_short_text_and_one_that_is_measured_on_are_said(run: Run, model: Path, tmp_path: Path) -> None:
    words = ("quantize", "--model", model, "--out", tmp_path / "small", "--encoding", "int4-g32", "--no-measure")
    code, _, err = run(*words, "--calibrate", TEXT)
    assert code == 0
    assert "note: the calibration text gives 58 rows of 192 tokens where 85 were asked for" in err
    assert "alice.txt holds the text on which the loss is measured" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calibrate", "nowhere.txt"), "nowhere.txt"),
        (("--calibrate", "SHORT"), "short.txt: the calibration text has 50 tokens: at least 128 are needed"),
        (("--calibrate", "BYTES"), "bytes.txt: no UTF-8 text (invalid start byte at byte 1)"),
        (("--encoding", "dense", "--calibrate", "SHORT"), "encoding dense changes nothing"),
        (("--encoding", "int8", "--calibrate", "SHORT"), "the encoding int8 cannot be fitted to a text"),
        (("--fit", "best"), "unknown fit 'best' (known: weighted, feedback)"),
        (("--head", "int7"), "unknown encoding 'int7' (known: dense, "),
        (("--head", "int4"), "int4 has groups of 128 columns, which 64 columns are not: take int4-g64"),
        (("--encoding", "int4"), ": int4 has groups of 128 columns, which 64 columns are not: take int4-g64"),
    ],
)
def test_a_mistake_is_one_line(run: Run, model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    files = {"SHORT": tmp_path / "short.txt", "BYTES": tmp_path / "bytes.txt"}
    files["SHORT"].write_text("a" * 50)
    files["BYTES"].write_bytes(b"a\xff" * 200)
    words = [str(files.get(word, word)) for word in arguments]
    if "--encoding" not in words:
        words += ["--encoding", "int4-g32"]
    code, out, err = run("quantize", "--model", model, "--out", tmp_path / "small", *words)
    assert code == 2 and not out and message in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "small").exists()


def test_a_word_for_no_matrix_is_refused_by_name(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    for told, message in (({"layers.9.attention.wq": "int8"}, "names layers.9.attention.wq"), ([1], "encodings is")):
        config["llama_fast"]["encodings"] = told
        (model / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(model)

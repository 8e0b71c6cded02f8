"""Logits from elsewhere: what is agreed with, what differs, and what is no file of logits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_ref.checkpoint import Checkpoint, save_checkpoint
from llama_ref.model import Llama
from oracle import cli
from oracle.subjects.adapters import stage_widths

Tensors = dict[str, Tensor]


@pytest.fixture
def model(tmp_path: Path, tiny: Checkpoint) -> str:
    save_checkpoint(tmp_path / "tiny", tiny.config, {name: source[:] for name, source in tiny.weights.items()}, "dense")
    return str(tmp_path / "tiny")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llama-oracle", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def cases(tmp_path: Path, model: str, run: Callable[..., tuple[int, str, str]]) -> Path:
    path = tmp_path / "cases.json"
    code, out, _ = run("record-cases", "--model", model, "--out", path)
    assert code == 0 and "row.1 [96, 257]" in out
    return path


def elsewhere(cases: Path, tiny: Checkpoint, dtype: torch.dtype = torch.float32) -> Tensors:
    """What another engine would write: here the reference, row by row, with greedy tokens and two stages."""
    document = json.loads(cases.read_text())
    llama = Llama(tiny.config, {name: source[:].to(dtype) for name, source in tiny.weights.items()}, dtype)
    found: Tensors = {}
    for i, row in enumerate(document["rows"]):
        seen: Tensors = {}
        found[f"row.{i}"] = llama(torch.tensor([row]), seen.__setitem__)[0].contiguous()
        found |= {f"row.{i}.{stage}": seen[stage][0].contiguous() for stage in ("embedding", "layers.0", "layers.1")}
    for i, prompt in enumerate(document["prompts"]):
        tokens = list(prompt)
        for _ in range(document["new_tokens"]):
            tokens.append(int(llama(torch.tensor([tokens]))[0, -1].argmax()))
        found[f"greedy.{i}"] = torch.tensor(tokens[len(prompt) :])
    return found


@pytest.fixture
def judged(
    tmp_path: Path, cases: Path, run: Callable[..., tuple[int, str, str]]
) -> Callable[..., tuple[int, str, str]]:
    def judged(tensors: Tensors, *more: object) -> tuple[int, str, str]:
        save_file(tensors, tmp_path / "logits.safetensors")
        return run("judge", "--cases", cases, "--logits", tmp_path / "logits.safetensors", "--device", "cpu", *more)

    return judged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_model_elsewhere_agrees(
    dtype: torch.dtype, cases: Path, tiny: Checkpoint, judged: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = judged(elsewhere(cases, tiny, dtype))
    assert code == 0 and out.rstrip().endswith("AGREE")
    assert {"logits: AGREE", "greedy: AGREE"} <= set(out.splitlines())
    assert f"{str(dtype)[6:]} stages: AGREE" in out


def test_log_probabilities_agree_and_rows_need_no_stages(
    cases: Path, tiny: Checkpoint, judged: Callable[..., tuple[int, str, str]]
) -> None:
    rows = {f"row.{i}": elsewhere(cases, tiny)[f"row.{i}"].log_softmax(-1) for i in range(2)}
    assert judged(rows)[0] == 0


def test_bf16_arithmetic_shown_in_float32_is_judged_as_what_it_is(
    cases: Path, tiny: Checkpoint, judged: Callable[..., tuple[int, str, str]]
) -> None:
    rows = {f"row.{i}": elsewhere(cases, tiny, torch.bfloat16)[f"row.{i}"].float() for i in range(2)}
    assert judged(rows, "--dtype", "bfloat16")[0] == 0
    code, out, _ = judged(rows)
    assert code == 1 and "say --dtype" in out


def worse(tensors: Tensors, name: str, change: Callable[[Tensor], Tensor]) -> Tensors:
    return tensors | {name: change(tensors[name]).contiguous()}


def nan_at(position: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(logits_TV: Tensor) -> Tensor:
        return torch.where(torch.arange(len(logits_TV))[:, None] == position, value, logits_TV)

    return change


@pytest.mark.parametrize(
    "name, change, told",
    [
        ("row.1", nan_at(41, torch.nan), "row 1, position 41"),
        ("row.0", nan_at(5, torch.inf), "row 0, position 5"),
        ("row.1", lambda x: x[:, :-1], "row 1: shape [96, 256] instead of [96, 257]"),
        ("row.0", lambda x: x[:-4], "row 0: shape [125, 257] instead of [129, 257]"),
        ("row.1", lambda x: x.roll(1, 0), "FAIL whole"),
        ("row.0.layers.1", lambda x: x * 1.0001, "first fault: layers.1"),
        ("greedy.0", lambda x: x.flip(0), "FAIL margin of a disagreement"),
        ("greedy.1", lambda x: x[:-1], "greedy.1 holds 23 tokens"),
        ("greedy.1", lambda x: x + 250, "outside the vocabulary of 257"),
    ],
)
def test_what_is_wrong_differs_and_is_named(
    name: str,
    change: Callable[[Tensor], Tensor],
    told: str,
    cases: Path,
    tiny: Checkpoint,
    judged: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = judged(worse(elsewhere(cases, tiny), name, change))
    assert code == 1 and out.rstrip().endswith("DIFFER")
    assert told in out


@pytest.mark.parametrize(
    "name, shape, told",
    [
        ("row.0.layer.0", (129, 64), "row.0.layer.0: the reference has no stage 'layer.0'"),
        ("row.1.layers.2", (96, 64), "row.1.layers.2: the reference has no stage 'layers.2'"),
        ("row.0.layers.1.gate", (129, 96), "row.0.layers.1.gate: the reference has no stage 'layers.1.gate'"),
        ("row.0.logits", (129, 257), "row.0.logits: the reference has no stage 'logits'"),
        ("row.2.layers.0", (96, 64), "row.2.layers.0: 2 rows were asked for"),
        ("row.1.layers.0", (95, 64), "row.1.layers.0 is [95, 64], not [96, 64]"),
        ("row.1.layers.0.k", (96, 96), "row.1.layers.0.k is [96, 96], not [96, 48]"),
    ],
)
def test_a_stage_that_cannot_be_judged_is_refused(
    name: str,
    shape: tuple[int, int],
    told: str,
    cases: Path,
    tiny: Checkpoint,
    judged: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, err = judged(elsewhere(cases, tiny) | {name: torch.zeros(shape)})
    assert (code, out) == (2, "")
    assert f"logits.safetensors: {told}" in err and err.count("\n") == 1


@pytest.mark.parametrize("row", [0, 1])
def test_a_stage_is_judged_over_the_rows_that_show_it(
    row: int, cases: Path, tiny: Checkpoint, judged: Callable[..., tuple[int, str, str]]
) -> None:
    tensors = elsewhere(cases, tiny)
    del tensors[f"row.{1 - row}.layers.0"]
    code, out, _ = judged(tensors)
    assert code == 0 and "float32 stages: AGREE" in out
    code, out, _ = judged(worse(tensors, f"row.{row}.layers.0", nan_at(5, torch.nan)))
    assert code == 1 and "first fault: layers.0" in out and f"at row {row}, position 5" in out
    alone = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 1 or name.count(".") == 1}
    alone[f"row.{row}.layers.0"] = tensors[f"row.{row}.layers.0"]
    assert judged(alone)[0] == 0
    code, out, _ = judged(worse(alone, f"row.{row}.layers.0", nan_at(5, torch.nan)))
    assert code == 1 and "first fault: layers.0" in out and f"at row {row}, position 5" in out


def test_the_stages_of_a_file_are_those_of_the_reference(tiny: Checkpoint) -> None:
    seen: Tensors = {}
    Llama(tiny.config, tiny.weights, torch.float32)(torch.tensor([[1, 2, 3]]), seen.__setitem__)
    assert stage_widths(tiny.config) == {
        name: value[0].flatten(1).shape[1] for name, value in seen.items() if name != "logits"
    }


def test_a_missing_row_differs_and_an_empty_list_is_empty(
    cases: Path, tiny: Checkpoint, judged: Callable[..., tuple[int, str, str]]
) -> None:
    tensors = elsewhere(cases, tiny)
    code, out, _ = judged({"row.0": tensors["row.0"]})
    assert code == 1 and "row.1 is missing" in out
    code, out, _ = judged(tensors | {"row.7": tensors["row.0"].clone()})
    assert code == 1 and "row.7 was not asked for" in out
    cases.write_text(json.dumps(json.loads(cases.read_text()) | {"rows": [], "prompts": []}))
    code, out, _ = judged({"row.0": tensors["row.0"]})
    assert code == 1 and out.rstrip().endswith("EMPTY")


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda cases, logits: logits.write_bytes(logits.read_bytes()[:-100]), "not a whole safetensors file"),
        (lambda cases, logits: logits.write_bytes(logits.read_bytes()[:5]), "not a whole safetensors file"),
        (lambda cases, logits: logits.write_bytes(b""), "not a whole safetensors file"),
        (lambda cases, logits: logits.unlink(), "no such file"),
        (lambda cases, logits: save_file({"lm_head": torch.zeros(2, 2)}, logits), "'lm_head' is neither"),
        (lambda cases, logits: save_file({"row.0": torch.zeros(3)}, logits), "row.0 is [3]"),
        (lambda cases, logits: cases.write_text(cases.read_text()[:-30]), "not JSON, or cut short"),
        (lambda cases, logits: cases.write_text("[]"), "its schema is not"),
        (lambda cases, logits: cases.write_text(cases.read_text().replace("[[", "[[-1, ", 1)), "holds -1"),
        (lambda cases, logits: cases.write_text(cases.read_text().replace(": 257", ": 300", 1)), "vocabulary of 300"),
    ],
)
def test_a_file_that_cannot_be_read_is_exit_2_and_one_line(
    spoil: Callable[[Path, Path], object],
    told: str,
    tmp_path: Path,
    cases: Path,
    run: Callable[..., tuple[int, str, str]],
) -> None:
    logits = tmp_path / "logits.safetensors"
    save_file({"row.0": torch.zeros(129, 257), "row.1": torch.zeros(96, 257)}, logits)
    spoil(cases, logits)
    code, out, err = run("judge", "--cases", cases, "--logits", logits, "--device", "cpu")
    assert (code, out) == (2, "")
    assert told in err and err.count("\n") == 1

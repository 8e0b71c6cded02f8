"""The command: its exit codes, its certificate, and that its words go to the right places."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama_fast.build import build
from llama_fast.encodings.int8 import Int8
from llama_fast.recipes import encoding_named, optimised
from llama_ref.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from llama_ref.config import NAMED, LlamaConfig
from oracle import again, cli
from oracle.questions import witnesses
from oracle.questions.witnesses import Told
from oracle.report.certificate import SCHEMA, Certificate
from oracle.statistics.compare import Outcome, Unjudgeable
from oracle.subjects.adapters import RefSubject
from oracle.verify import _round_trip, _verify_encoding, judge_runner, references, verify
from oracle.verify_ranks import CORNERS
from tests.fast.test_stored_gguf import model as gguf_model
from tests.ref.lora_files import write_adapter
from tests.ref.quantised_files import write as write_quantised

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path: Path, tiny: Checkpoint) -> str:
    """The tiny model as a directory, which another process can open too."""
    path = tmp_path / "tiny"
    save_checkpoint(path, tiny.config, {name: source[:] for name, source in tiny.weights.items()}, "dense")
    return str(path)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch, tiny: Checkpoint) -> str:
    """The tiny shape under a name that the command line knows."""
    monkeypatch.setitem(NAMED, "tiny", tiny.config)
    return "random:tiny"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["llama-oracle", "verify", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("encoding", ["dense", "int8"])
def test_agree_is_exit_0_and_a_certificate(
    encoding: str,
    saved: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "certificate.json"
    words = ("--model", saved, "--encoding", encoding, "--device", "cpu", "--dtype", "bfloat16", "--json", str(path))
    assert run(monkeypatch, *words) == 0
    out, err = capsys.readouterr()
    assert out.rstrip().endswith("AGREE")
    assert "float32: building" in err
    document = json.loads(path.read_text())
    assert document["schema"] == SCHEMA
    assert document["outcome"] == "AGREE"
    assert document["subject"]["encoding"] == encoding
    names = {part["name"] for part in document["parts"]}
    kinds = ("rope table", "stages", "logits", "requests", "window")
    of_types = {f"{dtype} {part}" for dtype in ("float32", "bfloat16") for part in kinds}
    loop = {"sampling", "face", "seeds", "objects", "rows that come and go", "loop"}
    loop |= {"stop rules", "draws", "repetition", "other process"}
    files = {"weights", "round trip", "witnesses"}
    assert of_types | loop | files | ({"bfloat16 stored numbers"} if encoding == "int8" else set()) == names
    assert "no witness of ids and conversations: there is no tokenizer" in document["notes"]
    assert all(check["ok"] for part in document["parts"] for check in part["checks"])


def test_differ_is_exit_1(named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def off(config: LlamaConfig) -> torch.Tensor:
        return rope_table(replace(config, rope_theta=config.rope_theta * 1.0001))

    from llama_fast.model import llama as model

    rope_table = model.rope_table
    monkeypatch.setattr(model, "rope_table", off)
    assert run(monkeypatch, "--model", named, "--device", "cpu") == 1
    out = capsys.readouterr().out
    assert "FAIL rope table" in out
    assert "first fault: layers.0.q_rope" in out
    assert out.rstrip().endswith("DIFFER")


@pytest.mark.parametrize(
    "words, told",
    [
        (("--model", "no/such/model.gguf"), "no/such/model.gguf"),
        (("--model", "random:unheard-of"), "unknown shape"),
        (("--model", "random:tiny", "--encoding", "int3"), "unknown encoding 'int3' (known: dense, "),
        (("--model", "random:tiny", "--dtype", "float8"), "unknown dtype 'float8'"),
        (("--model", "random:tiny", "--json", "no/such/dir/c.json"), "no such directory"),
    ],
)
def test_what_cannot_run_is_exit_2_and_one_line(
    words: tuple[str, ...], told: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words, "--device", "cpu") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1


def test_the_same_input_gives_the_same_bytes_apart_from_the_date(tiny: Checkpoint) -> None:
    first, second = (verify(tiny, optimised(Int8()), CPU, torch.bfloat16).to_json("2000-01-01") for _ in range(2))
    assert first == second
    assert '"date": "2000-01-01"' in first


def test_a_subject_that_errs_beyond_comparison_still_gets_a_readable_certificate(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_fast.arithmetic import pytorch

    monkeypatch.setattr(pytorch, "rotate", lambda x, turns: x * torch.nan)
    certificate = verify(tiny, optimised(), CPU, torch.float32)
    assert certificate.outcome is Outcome.DIFFER
    assert "first fault: layers.0.q_rope" in certificate.to_text()
    fault = json.loads(certificate.to_json())["first_fault"]
    assert fault["stage"] == "layers.0.q_rope"
    assert fault["subject"].startswith("mean nan")


def test_an_encoding_without_a_budget_is_empty(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oracle.verify.budget_of", lambda name: None)
    assert verify(tiny, optimised(Int8()), CPU, torch.float32).outcome is Outcome.EMPTY


def test_drift_is_asked_where_there_is_a_text(tiny: Checkpoint) -> None:
    def encode(text: str) -> list[int]:
        return [byte % 257 for byte in text.encode()]

    certificate = verify(tiny, optimised(Int8()), CPU, torch.float32, encode)
    assert certificate.drift is not None and certificate.plain_drift is not None
    assert certificate.drift.positions == 1024
    assert certificate.parts["drift"].checks


def test_the_quick_verdict_keeps_to_the_shapes_it_is_given(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a compiled rung nothing else may run: one row, one cache length, one token a step."""
    runner = build(tiny, optimised(), CPU, torch.float32)
    shapes: set[tuple[int, int, int]] = set()

    def step(self: object, tokens_BT: torch.Tensor, start_B: torch.Tensor, cache: object, choose: object) -> object:
        shapes.add((*tokens_BT.shape, cache.length))  # type: ignore[attr-defined]
        return original(self, tokens_BT, start_B, cache, choose)

    original = type(runner).step
    monkeypatch.setattr(type(runner), "step", step)
    monkeypatch.setattr(type(runner), "score", None)
    verdict = judge_runner(runner, tiny, cache_length=256)
    assert verdict.outcome is Outcome.AGREE
    assert shapes == {(1, 1, 256)}
    assert judge_runner(runner, tiny, prompt=[1] * 20, cache_length=20).outcome is Outcome.EMPTY


def test_the_reference_in_float64_is_never_read_at_once(tiny: Checkpoint) -> None:
    """One weight at a time is widened: what a 7B model needs to be judged on one GPU."""
    alive: list[int] = []

    class Source:
        shape = (0,)
        dtype = torch.float32

        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, key: object) -> torch.Tensor:
            alive.append(1)
            return tiny.weights[self.name][:]

    subject = RefSubject(tiny.config, {name: Source(name) for name in tiny.weights}, torch.float64)
    assert alive == []
    subject.prefill_logits([[1, 2, 3]])
    assert len(alive) == len(tiny.weights)


def test_a_witness_that_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where a tokenizer's class wants a package that is not installed: the model is judged all the same."""
    import transformers

    def absent(*_: object, **__: object) -> None:
        raise ImportError("needs mistral-common\nand more words")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", absent)
    (tmp_path / "tokenizer.json").write_text("{}")
    told = Told()
    witnesses.texts(told, tmp_path, SimpleNamespace(encode=list))  # type: ignore[arg-type]
    assert told == Told({}, {}, ["ids and conversations: needs mistral-common"])


@pytest.mark.parametrize("kind", ["gptq-order", "ct-int8", "awq"])
def test_matrices_that_another_tool_packed_have_no_witness_and_the_rest_has(kind: str, tmp_path: Path) -> None:
    write_quantised(tmp_path, kind)
    told, checkpoint = Told(), open_checkpoint(tmp_path)
    witnesses.numbers(told, tmp_path, checkpoint)
    plain = 1 + 2 * 2 + 1 + 1  # the table, two norms a block, the last norm, the head
    assert told.verdict().outcome is Outcome.AGREE and told.verdict().checks[0].compared >= plain
    assert len(told.without) == 1 and "packed matrices: no witness unpacks them" in told.without[0]
    bent = {**checkpoint.weights, "norm.weight": checkpoint.weights["norm.weight"][:] * 1.01}
    witnesses.numbers(again := Told(), tmp_path, replace(checkpoint, weights=bent))
    assert again.verdict().outcome is Outcome.DIFFER


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_numbers_of_a_file_that_is_kept_as_stored_are_its_own_in_either_type(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(gguf_model(tmp_path / "m.gguf", "q4_k", {"blk.0.attn_v": "f16", "output": "q8_0"}))
    runner = build(checkpoint, optimised(encoding_named("stored")), CPU, dtype)
    truth, _ = references(runner, checkpoint)
    _verify_encoding(found := Certificate({}), truth, runner, checkpoint, None, lambda _: None)
    assert found.parts["weights"].outcome is Outcome.AGREE, found.parts["weights"]
    name = "layers.1.feed_forward.w1.weight"
    other = {**checkpoint.weights, name: checkpoint.weights[name][:].flip(0)}
    _verify_encoding(found, truth, runner, replace(checkpoint, weights=other), None, lambda _: None)
    assert found.parts["weights"].outcome is Outcome.DIFFER


def test_an_error_inside_a_question_differs_and_is_told_with_its_place(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_fast.engine.sampling import BatchSampler

    choose = BatchSampler.__call__

    def outside(self: BatchSampler, logits_BV: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
        return choose(self, logits_BV, position_B) + 1000

    monkeypatch.setattr(BatchSampler, "__call__", outside)
    certificate = verify(tiny, optimised(), CPU, torch.float32)
    assert certificate.outcome is Outcome.DIFFER
    ended = [check for check in certificate.verdict.failures if "ended with an error" in check.name]
    assert ended and all(".py:" in check.where for check in ended)


def test_weights_that_cannot_be_judged_are_refused(tiny: Checkpoint) -> None:
    weights = dict(tiny.weights) | {"norm.weight": torch.full((64,), torch.nan)}
    with pytest.raises(Unjudgeable, match="float64 truth holds NaN"):
        verify(replace(tiny, weights=weights), optimised(), CPU, torch.float32)


def test_a_round_trip_that_cannot_be_asked_is_empty(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oracle.verify.has_no_file", lambda checkpoint: "no config.json says it")
    found = _round_trip(tiny, optimised(), CPU, torch.float32)
    assert found.outcome is Outcome.EMPTY and "no config.json says it" in str(found)


@pytest.mark.parametrize(
    "words, told",
    [
        (("--cache", "grown"), "unknown cache 'grown' (known: static, growing, paged)"),
        (("--projections", "torn"), "unknown projections 'torn' (known: joined, separate)"),
        (("--rung", "baseline", "--compile"), "--rung says what the plan and its draft are"),
        (("--rung", "tp"), "say --ranks 2"),
        (("--rung", "unheard-of"), "unknown rung 'unheard-of'"),
        (("--rung", "fused"), "it needs a CUDA device"),
        (("--ranks", "1"), "a model is cut over two or more"),
        (("--ranks", "3"), "n_heads=4 does not divide over 3 ranks"),
    ],
)
def test_a_plan_that_cannot_be_spelled_is_exit_2_and_one_line(
    words: tuple[str, ...], told: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--model", named, "--device", "cpu", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in err and err.count("\n") == 1


@pytest.mark.parametrize("words", [("--cache", "growing", "--projections", "separate"), ("--rung", "baseline")])
def test_the_ladders_first_rung_can_be_asked(
    words: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--model", named, "--device", "cpu", *words) in (0, 1)
    out = capsys.readouterr().out
    assert "plan      dense · growing · eager · whole\n" in out


def test_ranks_are_judged_by_the_command(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ranks.json"
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    assert run(monkeypatch, "--model", saved, "--device", "cpu", "--ranks", "2", "--json", str(path)) == 0
    document = json.loads(path.read_text())
    assert document["outcome"] == "AGREE" and "tensor parallel over 2" in document["subject"]["plan"]
    (ranks,) = [part for part in document["parts"] if part["name"] == "all ranks"]
    assert [check["compared"] for check in ranks["checks"]] == [2, 2]
    assert {f"corner: {name}" for name in CORNERS} <= {part["name"] for part in document["parts"]}


@pytest.mark.parametrize("name", ["sparse24-int8", "int4-g32", "int8-g32-zero"])
def test_a_narrow_encoding_is_wired_right_and_its_weights_are_compared(tiny: Checkpoint, name: str) -> None:
    certificate = verify(tiny, optimised(encoding_named(name)), CPU, torch.float32)
    assert certificate.outcome is Outcome.AGREE, certificate.to_text()
    assert certificate.parts["weights"].checks[0].compared


def test_the_witness_of_a_file_is_not_asked_of_what_an_adapter_made_of_it(
    saved: str, tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "lora", tiny.config)
    question = json.dumps({"prompts": [], "new_tokens": 0})
    words = ["--model", saved, "--device", "cpu", "--dtype", "float32", "--plan", "{}", "--cache-length", "8"]
    monkeypatch.setattr(sys, "argv", ["again", *words, "--ask", question, "--adapter", str(adapter)])
    again.main()
    told = json.loads(capsys.readouterr().out)["witnesses"]
    assert told["compared"]["tensors that a witness reads otherwise"] == len(tiny.weights)
    assert told["wrong"]["tensors that a witness reads otherwise"] == []
    assert "the adapter's numbers: they are read by one reader" in told["without"]


def test_a_cache_of_pages_agrees_and_is_asked_to_share_them(
    saved: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--model", saved, "--device", "cpu", "--dtype", "float32", "--cache", "paged") == 0
    out = capsys.readouterr().out
    assert "plan      dense · paged · eager · whole · fused projections\n" in out
    assert "rows that continue otherwise in shared pages" in out

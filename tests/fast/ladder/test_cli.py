"""The command line: the lines that scripts read, the files it writes, and one line for every mistake."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from llama_fast import Llama
from llama_fast.ladder import cli
from llama_ref.checkpoint import Checkpoint, random_checkpoint, save_checkpoint
from llama_ref.tokenizers.tokenizer import RandomTokenizer
from tests.fast.ladder.conftest import Run
from tests.ref.lora_files import write_adapter

PYTORCHS_OWN = re.compile(r"[VIWE]\d{4} [\d:.]+ \d+ torch/")
"""How a line of PyTorch's log begins: a build with CUDA says there that it sees no GPU."""


@pytest.fixture
def model(untied: Checkpoint, tmp_path: Path) -> Path:
    tokenizer = RandomTokenizer(untied.config.vocab_size, None, ())
    save_checkpoint(tmp_path / "model", untied.config, dict(untied.weights), tokenizer=tokenizer)
    return tmp_path / "model"


def test_generate_prints_the_contracts_lines(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    code, out, _ = run(
        "generate", "--model", model, "--prompt", "ab", "--max-new-tokens", 6, "--num-samples", 2, "--json", file
    )
    assert code == 0
    for line in (r"Average tokens/sec: \d+\.\d\d", r"Bandwidth achieved: \d+\.\d\d GB/s", r"Memory used: \d+\.\d\d GB"):
        assert re.search(f"^{line}$", out, re.M), line
    data = json.loads(file.read_text())
    assert len(data["samples"]) == 2 and all(1 <= len(sample["tokens"]) <= 6 for sample in data["samples"])
    assert data["samples"][0]["tokens"] != data["samples"][1]["tokens"], "every sample has its own seed"


def test_streaming_shows_the_same_text(run: Run, model: Path) -> None:
    arguments = ("generate", "--model", model, "--prompt", "ab", "--max-new-tokens", 9, "--temperature", 0)
    plain, streamed = run(*arguments)[1], run(*arguments, "--stream")[1]
    assert plain.splitlines()[0] == streamed.splitlines()[0] != ""


def test_the_last_seed_is_followed_by_the_first(run: Run, model: Path, tmp_path: Path) -> None:
    """As in a batch, whose row b draws with seed + b."""
    told = []
    for seed, samples in ((2**64 - 1, 2), (0, 1)):
        file = tmp_path / "out.json"
        words = ("--prompt", "ab", "--max-new-tokens", 6, "--seed", seed, "--num-samples", samples, "--json", file)
        assert run("generate", "--model", model, *words)[0] == 0
        told.append(json.loads(file.read_text())["samples"][-1]["tokens"])
    assert told[0] == told[1]


def test_drafts_change_the_speed_and_nothing_else(run: Run, model: Path, tmp_path: Path) -> None:
    arguments = ("generate", "--model", model, "--prompt", "ab", "--max-new-tokens", 20, "--temperature", 0)
    plain = run(*arguments)[1].splitlines()[0]
    file = tmp_path / "out.json"
    for draft in (("ngram",), (model, "--draft-encoding", "fp8"), (model, "--speculate", 3)):
        code, out, _ = run(*arguments, "--num-samples", 2, "--json", file, "--draft", *draft)
        assert code == 0 and out.splitlines()[0] == plain
        assert re.search(r"^Speculation \(.+\): ", out, re.M)
        assert ("Of this the draft: " in out) == (draft[0] != "ngram")
        data = json.loads(file.read_text())
        counted, singles = data["speculation"], [sample["speculation"] for sample in data["samples"]]
        assert counted["rounds"] == sum(single["rounds"] for single in singles) and 0 <= counted["acceptance"] <= 1
        assert {"tokens_per_round", "lengths", "draft_cost", "check_cost", "notice"} <= set(counted)
    assert counted["lengths"]["3"] > 0 and re.search(r"^Accepted lengths: .*3: \d+", out, re.M)


def test_quantize_writes_a_directory_that_stands_alone(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert run("quantize", "--model", model, "--out", out)[0] == 0
    arguments = ("--prompt", "ab", "--max-new-tokens", 9, "--temperature", 0)
    direct = run("generate", "--model", model, "--encoding", "int8", *arguments)[1].splitlines()[0]
    for path in model.iterdir():
        path.unlink()
    assert run("generate", "--model", out, *arguments)[1].splitlines()[0] == direct
    code, _, err = run("quantize", "--model", out, "--out", tmp_path / "again")
    assert code == 2 and "stored as int8 already" in err


def test_an_adapter_is_applied_by_every_command(run: Run, model: Path, tmp_path: Path, untied: Checkpoint) -> None:
    """Quantised with it, a model answers as the adapted one does in int8."""
    adapter, file = write_adapter(tmp_path / "adapter", untied.config), tmp_path / "out.json"
    arguments = ("--prompt", "ab", "--max-new-tokens", 9, "--temperature", 0, "--json", file)

    def answer(*words: object) -> list[int]:
        code, _, err = run("generate", *words, *arguments)
        assert code == 0, err
        told = json.loads(file.read_text())
        assert told["adapter"] == (str(adapter) if "--adapter" in words else None)
        return list(told["samples"][0]["tokens"])

    plain, adapted = answer("--model", model), answer("--model", model, "--adapter", adapter)
    assert plain != adapted
    llama = Llama.from_pretrained(model, device="cpu", adapter=adapter)
    assert llama.generate("ab", max_new_tokens=9).ids == adapted
    assert run("quantize", "--model", model, "--adapter", adapter, "--out", tmp_path / "small")[0] == 0
    whole = answer("--model", model, "--adapter", adapter, "--encoding", "int8")
    assert answer("--model", tmp_path / "small") == whole
    assert run("quantize", "--model", model, "--out", tmp_path / "plain")[0] == 0
    assert answer("--model", tmp_path / "plain", "--adapter", adapter) != answer("--model", tmp_path / "plain")
    code, out, err = run("generate", "--model", model, "--adapter", model)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "adapter_config.json: no such file" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--max-new-tokens", 0), "max_new_tokens=0 must be at least 1"),
        (("generate", "--max-new-tokens", -5), "max_new_tokens=-5 must be at least 1"),
        (("generate", "--prompt", "x" * 200), "exceed the model's context of 128"),
        (("generate", "--prompt", ""), "a prompt is empty"),
        (("generate", "--encoding", "int7"), "unknown encoding 'int7' (known: dense, "),
        (("generate", "--dtype", "float8"), "unknown dtype 'float8' (known: float32, bfloat16)"),
        (("generate", "--temperature", -1), "temperature=-1.0"),
        (("generate", "--stop", ""), "a stop string is empty"),
        (("generate", "--fused", "--compile"), "choose one"),
        (("generate", "--fused", "--device", "cpu"), "the fused kernels need a CUDA device"),
        (("generate", "--draft", "ngram", "--speculate", 0), "k=0 must be at least 1"),
        (("generate", "--draft", "random:llama-2-7b", "--speculate", 0), "k=0 must be at least 1"),
        (
            ("generate", "--draft", "ngram", "--speculate", 200, "--max-new-tokens", 9),
            "k=200 is larger than the context left",
        ),
        (("generate", "--draft", "ngram", "--draft-encoding", "int8"), "an n-gram lookup has no weights"),
        (("generate", "--speculate", 4), "--draft must say by whom"),
        (("generate", "--draft", "nobody"), "unknown model 'nobody'"),
        (("quantize", "--encoding", "dense"), "encoding dense changes nothing"),
        (("bench", "--rungs", "warp"), "unknown rung 'warp' (known: baseline"),
        (("bench", "--profile", "."), "cannot write the trace ."),
        (("bench", "--rungs", "compiled,fused", "--device", "cpu"), "the rung fused needs a CUDA device"),
        (("generate", "--profile", "/no/such/trace.json"), "/no/such: no such directory"),
        (("generate", "--profile", "."), ". is a directory"),
        (("generate", "--json", "/no/such/out.json"), "/no/such: no such directory"),
        (("bench", "--new-tokens", 1), "Invalid value for '--new-tokens'"),
        (("generate", "--max-new-tokens", "many"), "Invalid value for '--max-new-tokens'"),
        (("generate", "--max-new-token", 3), "No such option: --max-new-token"),
        (("generate", "--top-p", "nan"), "top_p=nan must lie in (0, 1]"),
        (("generate", "--seed", -1), "seed=-1 must lie in"),
        (("generate", "--prompt", b"\xff".decode(errors="surrogateescape")), "half a character, not text"),
        (
            ("generate", "--draft", "ngram", "--logprobs", 1, "--max-new-tokens", 9),
            "logprobs are not told with a draft",
        ),
        (("chat", "--stop", ""), "a stop string is empty"),
        (("chat", "--temperature", -1), "temperature=-1.0"),
        (("bench", "--prompt", ""), "a prompt is empty"),
        (("bench", "--new-tokens", 500), "exceed the model's context of 128"),
        (("generate", "--model", "x" * 5000), "unknown model"),
        (("frobnicate",), "No such command 'frobnicate'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    run: Run, model: Path, arguments: tuple[object, ...], message: str
) -> None:
    code, out, err = run(*arguments, *(() if "--model" in arguments else ("--model", model)))
    assert code == 2 and (arguments[0] == "bench" or not out), "a prompt before the error would stand on its line"
    assert message in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_without_a_command_there_is_help(run: Run) -> None:
    code, out, err = run()
    assert code == 2 and "quantize" in out and not err
    code, out, err = run("--help")
    assert code == 0 and "quantize" in out and not err


def test_a_launchers_nonsense_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = run("generate")
    assert code == 2 and err == "error: a launcher's variables must be numbers: RANK=x, LOCAL_RANK=x\n"


def test_a_first_call_prepares_the_whole_request(model: Path) -> None:
    llama = Llama.from_pretrained(model, device="cpu")
    cli.warm_up(llama, "a", 100, {"temperature": 0.0, "logprobs": 2})
    kept = llama.caches.kept[1]
    llama.generate("a", 100)
    assert llama.caches.kept[1] is kept, "a longer cache would be compiled for again, and timed"


def test_a_stored_encoding_has_a_ladder_of_its_own(run: Run, model: Path, tmp_path: Path) -> None:
    stored = tmp_path / "int8"
    assert run("quantize", "--model", model, "--out", stored)[0] == 0
    code, out, err = run(
        "bench", "--model", stored, "--out", tmp_path, "--prompt", "a", "--samples", 1, "--new-tokens", 4
    )
    ours = [line for line in err.splitlines() if not PYTORCHS_OWN.match(line)]
    assert (code, ours) == (0, []), err
    (rung,) = json.loads((tmp_path / "ladder.json").read_text())["rungs"]
    assert (rung["name"], rung["verdict"]) == ("int8", "AGREE") and "int8" in out


def test_a_draft_of_another_vocabulary(run: Run, model: Path, untied: Checkpoint, tmp_path: Path) -> None:
    config = dataclasses.replace(untied.config, vocab_size=90)
    weights = random_checkpoint(config, 3).weights
    save_checkpoint(tmp_path / "other", config, dict(weights), tokenizer=RandomTokenizer(90, None, ()))
    code, _, err = run("generate", "--model", model, "--draft", tmp_path / "other", "--max-new-tokens", 9)
    assert code == 2 and "the draft has a vocabulary of 90 tokens, the target one of 101" in err
    assert len(err.strip().splitlines()) == 1


def test_a_full_output_directory_is_left_alone(run: Run, model: Path) -> None:
    before = sorted((path, path.read_bytes()) for path in model.iterdir())
    code, _, err = run("quantize", "--model", model, "--out", model)
    assert code == 2 and "exists and is not empty" in err
    assert sorted((path, path.read_bytes()) for path in model.iterdir()) == before


def test_an_output_that_cannot_be_is_refused_before_the_model_is_sought(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (("quantize", "--model", "nobody", "--out", "."), ("convert", "nobody", ".")):
        code, _, err = run(*arguments)
        assert code == 2 and "is the working directory" in err and len(err.strip().splitlines()) == 1


def test_an_unknown_model_says_what_is_possible(run: Run) -> None:
    code, _, err = run("generate", "--model", "random:llama-9")
    assert code == 2 and "unknown shape 'llama-9'" in err and "llama-2-7b" in err


def test_our_own_bugs_are_one_line_too(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "resolve", lambda name: 1 / 0)
    code, _, err = run("generate", "--model", model)
    assert code == 2 and err.startswith("error: ZeroDivisionError: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_and_absent(run: Run, model: Path) -> None:
    code, _, err = run("generate", "--model", model, "--device", "cuda")
    assert code == 2 and "sees no CUDA device" in err


def test_a_text_of_a_grammar_is_generated(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    schema, file = tmp_path / "schema.json", tmp_path / "out.json"
    schema.write_text('{"const": 4277}')
    asked = ("generate", "--model", model, "--max-new-tokens", 5, "--num-samples", 2, "--json", file)
    monkeypatch.setattr(RandomTokenizer, "token_bytes", lambda self: [bytes([i]) for i in range(self.vocab_size)])
    for words, wanted in ((("--regex", "[AB]{3}"), {65, 66}), (("--json-schema", schema), set(b"4277"))):
        code, _, error = run(*asked, *words, "--frequency-penalty", 1.5, "--presence-penalty", 0.5)
        assert code == 0, error
        for sample in json.loads(file.read_text())["samples"]:
            assert sample["finish_reason"] == "stop" and set(sample["tokens"]) <= wanted


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--regex", "a", "--json-schema", "s.json"), "choose one"),
        (("--json-schema", "none.json"), "none.json"),
        (("--json-schema", "broken.json"), "no JSON"),
        (("--regex", "a"), "no language"),
        (("--frequency-penalty", "nan"), "frequency_penalty=nan"),
    ],
)
def test_a_grammar_that_cannot_be_had_is_told_in_one_line(
    run: Run, model: Path, tmp_path: Path, words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    code, _, error = run("generate", "--model", model, "--max-new-tokens", 5, *words)
    assert code == 2 and told in error and len(error.splitlines()) == 1

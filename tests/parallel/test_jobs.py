"""The ladder's rungs over ranks: started by `bench`, with every rank's memory; or `bench` itself under a launcher."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.ladder import cli, jobs, rungs
from llama_fast.ladder.bench import RungResult, Spread
from llama_fast.ladder.rungs import RUNGS, Rung, rungs_of
from llama_fast.parallel.stages import Stages
from llama_fast.parallel.tensor_parallel import TensorParallel
from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import NAMED, LlamaConfig
from llama_ref.tokenizers.tokenizer import RandomTokenizer
from tests.parallel.launched import Launched, environment, errors

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    dim=48, n_layers=1, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=72, vocab_size=301, max_context=256
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_checkpoint(path, CONFIG, dict(random_checkpoint(CONFIG, 3).weights), tokenizer=RandomTokenizer(301, None, ()))
    return path


def test_bench_starts_a_job_for_its_rungs_over_ranks(model: Path, tmp_path: Path) -> None:
    arguments = ("--model", model, "--rungs", "tp-int8", "--samples", 2, "--new-tokens", 20, "--out", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "llama_fast.ladder.cli", "bench", "--device", "cpu", *map(str, arguments)],
        env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    baseline, tp = json.loads((tmp_path / "ladder.json").read_text())["rungs"]
    assert (baseline["name"], baseline["ranks"]) == ("baseline", 1)
    assert (tp["name"], tp["ranks"], tp["verdict"]) == ("tp-int8", 2, "AGREE")
    assert len(tp["memory_by_rank_gb"]) == 2 and min(tp["memory_by_rank_gb"]) > 0
    table = 4e-9 * CONFIG.vocab_size * CONFIG.dim  # whole on every rank; of the rest half, in a byte instead of four
    assert tp["weights_gb"] - table == pytest.approx((baseline["weights_gb"] - table) / 8, rel=0.15)
    assert "tensor parallel over 2" in tp["plan"] and "2 ranks, memory" in done.stdout


def test_a_rung_for_one_process_is_refused_under_a_launcher(model: Path) -> None:
    with Launched(
        2, "-m", "llama_fast.ladder.cli", "bench", "--device", "cpu", "--model", model, "--rungs", "tp,int8"
    ) as job:
        code, output = job.ended()
    assert code != 0
    assert errors(output) == ["error: 2 ranks were started, and int8 is for one process: run it without"], output


def test_the_number_of_ranks() -> None:
    assert jobs.ranks_for(NAMED["smollm2-135m"], CPU, RUNGS["tp"]) == 3
    assert jobs.ranks_for(NAMED["llama-2-7b"], CPU, RUNGS["tp"]) == 2
    with pytest.raises(
        ValueError, match="n_heads=1, n_kv_heads=1 and ffn_dim=72 divide over no number of ranks from 2 on"
    ):
        jobs.ranks_for(dataclasses.replace(CONFIG, n_heads=1, n_kv_heads=1), CPU, RUNGS["tp"])
    assert not any(rung.over_ranks or rung.needs_cpu for rung in rungs_of(CPU)), "on a CPU only when asked for"


def test_the_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    visible = 8
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)  # as it is when asked
    gpu = torch.device("cuda")
    assert jobs.ranks_for(NAMED["llama-2-7b"], gpu, RUNGS["tp"]) == 8
    assert jobs.ranks_for(NAMED["smollm2-135m"], gpu, RUNGS["tp"]) == 3, "nine heads, three of keys and values"
    visible = 2
    assert jobs.ranks_for(NAMED["llama-2-7b"], gpu, RUNGS["tp"]) == 2
    with pytest.raises(
        ValueError, match="n_heads=9, n_kv_heads=3 and ffn_dim=1536 divide over no number of the 2 GPUs"
    ):
        jobs.ranks_for(NAMED["smollm2-135m"], gpu, RUNGS["tp"])
    visible = 1
    with pytest.raises(ValueError, match="the rung tp needs 2 GPUs, 1 is visible"):
        jobs.ranks_for(NAMED["llama-2-7b"], gpu, RUNGS["tp"])


def test_what_does_not_divide_is_left_out_unless_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bench(*more: str) -> int:
        flags = [
            "--device",
            "cpu",
            "--model",
            str(model),
            "--out",
            str(tmp_path),
            "--samples",
            "1",
            "--new-tokens",
            "4",
        ]
        monkeypatch.setattr(sys, "argv", ["llama-fast", "bench", *flags, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    def refuse(config: LlamaConfig, device: torch.device, rung: Rung) -> int:
        raise ValueError("does not divide")

    monkeypatch.setattr(jobs, "ranks_for", refuse)
    assert bench("--rungs", "tp") == 2 and "error: does not divide" in capsys.readouterr().err
    assert not (tmp_path / "ladder.json").exists()
    monkeypatch.setattr(rungs, "rungs_of", lambda *ignored, **named: [RUNGS["baseline"], RUNGS["tp"]])
    assert bench() == 0
    ladder = json.loads((tmp_path / "ladder.json").read_text())
    assert [rung["name"] for rung in ladder["rungs"]] == ["baseline"] and ladder["left_out"] == {
        "tp": "does not divide"
    }
    assert "tp: left out, does not divide" in capsys.readouterr().out


def test_ranks_climb_what_one_process_cannot_and_one_job_that_fails_leaves_the_others(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*ignored: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def climb(asked: Sequence[Rung], ranks: int, *ignored: object) -> list[RungResult]:
        if asked[0].name == "tp":
            raise ValueError("tp on 2 ranks: CUDA out of memory")
        numbers = {field.name: 1.0 for field in dataclasses.fields(RungResult) if field.type == "float"}
        words: dict[str, Any] = {"name": asked[0].name, "does": "", "plan": "", "dtype": "float32", "verdict": "AGREE"}
        counts = {"batch": 1, "prompt_tokens": 1, "new_tokens": 4, "cache_length": 5, "ranks": ranks}
        return [RungResult(**(numbers | words | counts), tokens_per_second=Spread(1.0, 1.0, 1.0))]

    monkeypatch.setattr("llama_fast.ladder.bench.build", full)
    monkeypatch.setattr(jobs, "climb", climb)
    for names, climbed, code, says in (
        ("tp-int8", ["tp-int8"], 0, ""),  # the baseline, which goes with it unasked, did not fit
        ("baseline,tp-int8", ["tp-int8"], 1, ""),
        ("tp,tp-int8", ["tp-int8"], 2, "error: tp on 2 ranks: CUDA out of memory\n"),
        (
            "baseline",
            [],
            2,
            f"error: {model}: no rung could be climbed: baseline: does not fit into the GPU's memory\n",
        ),
    ):
        flags = [
            "--device",
            "cpu",
            "--model",
            str(model),
            "--out",
            str(tmp_path),
            "--samples",
            "1",
            "--new-tokens",
            "4",
        ]
        monkeypatch.setattr(sys, "argv", ["llama-fast", "bench", "--rungs", names, *flags])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert (end.value.code, capsys.readouterr().err) == (code, says)
        ladder = json.loads((tmp_path / "ladder.json").read_text())
        assert [rung["name"] for rung in ladder["rungs"]] == climbed and "baseline" in ladder["left_out"]


def test_under_a_launcher_the_rungs_over_ranks_are_climbed() -> None:
    assert [rung.name for rung in rungs_of(CPU, launched=True)] == ["tp", "tp-int8"]
    assert [rung.name for rung in rungs_of(CPU, "int8", launched=True)] == ["tp-int8"]
    assert [rung.name for rung in rungs_of(CPU, "int8")] == ["int8"]


def test_a_job_that_fails_says_why_in_a_ranks_own_words() -> None:
    with pytest.raises(ValueError, match="tp on 2 ranks: unknown model 'no-such-model'"):
        jobs.climb([RUNGS["tp"]], 2, ["--model", "no-such-model", "--device", "cpu"], lambda text: None)


class Second:
    """The second of two ranks."""

    size = 2

    def in_stages(self, stages: int) -> TensorParallel | Stages:
        return TensorParallel(1, 2) if stages == 1 else Stages(1, stages)


def test_a_rank_climbs_its_part_of_the_plan() -> None:
    member: Any = Second()
    mine, stage = jobs.divided([RUNGS["tp-int8"], RUNGS["pp"]], member, CPU)
    assert str(mine.plans(CPU)[0]) == "int8 · static · compiled · tensor parallel over 2 · fused projections"
    assert str(stage.plans(CPU)[0]) == "dense · static · compiled · 2 stages · fused projections"
    with pytest.raises(ValueError, match="the rung tp-pp needs 4 ranks, 2 were started"):
        jobs.divided([RUNGS["tp-pp"]], member, CPU)


def test_the_number_of_ranks_in_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = NAMED["smollm2-135m"], NAMED["llama-2-70b"]
    assert [jobs.ranks_for(small, CPU, RUNGS[name]) for name in ("pp", "tp-pp")] == [2, 6], "nine heads: 2 x 3"
    assert [jobs.ranks_for(large, CPU, RUNGS[name]) for name in ("pp", "tp-pp")] == [2, 4]
    visible, gpu = 8, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert [jobs.ranks_for(large, gpu, RUNGS[name]) for name in ("pp", "tp-pp")] == [8, 8]
    assert [jobs.ranks_for(small, gpu, RUNGS[name]) for name in ("pp", "tp-pp")] == [8, 6]
    visible = 2
    with pytest.raises(ValueError, match="the rung tp-pp needs 4 GPUs, 2 are visible"):
        jobs.ranks_for(large, gpu, RUNGS["tp-pp"])
    visible = 1
    with pytest.raises(ValueError, match="the rung pp needs 2 GPUs, 1 is visible"):
        jobs.ranks_for(large, gpu, RUNGS["pp"])
    shallow = dataclasses.replace(CONFIG, n_layers=1)
    with pytest.raises(
        ValueError, match=r"n_layers=1, n_heads=6.*divide over no number of ranks from 2 on as pp has them"
    ):
        jobs.ranks_for(shallow, CPU, RUNGS["pp"])

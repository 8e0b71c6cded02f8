"""Pipeline stages that are real processes, over gloo: tensor x pipeline, and whatever they are asked they agree with one process.

`tox -e ranks` asks for every shape of the mesh, family, encoding, cache and compiler; tests/parallel/test_hosts.py for two hosts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_fast.parallel import ranks
from tests.parallel.launched import JOB, Launched, environment, errors
from tests.parallel.test_endings import ENDLESS, model

__all__ = ["model"]  # a fixture
EVERYTHING = "LLAMA_FAST_CYCLES" in os.environ
SAMPLE = [(2, 2, "llama3", "int8", "static", "eager")]
MATRIX = [
    (tensor, stages, "llama2,llama3,biased", "dense,int8,int4-g32", "growing,static,paged", "eager")
    for tensor, stages in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
] + [(2, 2, "llama3", "dense,int8", "static", "compiled")]
at_length = pytest.mark.skipif(not EVERYTHING, reason="takes long: `tox -e ranks`")
CLI = ("-m", "llama_fast.ladder.cli", "generate", "--prompt", "ab", "--temperature", 0, "--device", "cpu", "--model")


@pytest.mark.parametrize(
    ("tensor", "stages", "families", "encodings", "caches", "how"), MATRIX if EVERYTHING else SAMPLE
)
def test_the_oracle_agrees(tensor: int, stages: int, families: str, encodings: str, caches: str, how: str) -> None:
    with Launched(tensor * stages, JOB, "stages", stages, families, encodings, caches, how) as job:
        code, output = job.ended(3600 if EVERYTHING else 240)
    assert code == 0 and f"verdicts AGREE on {tensor * stages} ranks in {stages} stages" in output, output


def test_a_text_over_stages_is_the_text_of_one_and_it_starts_and_stops_again_and_again(model: Path) -> None:
    alone = subprocess.run(
        [sys.executable, *map(str, (*CLI, model, "--max-new-tokens", 12))],
        env=environment(), capture_output=True, text=True, timeout=120,
    ).stdout.splitlines()  # fmt: skip
    with Launched(2, *CLI, model, "--max-new-tokens", 12, "--stages", 2) as job:
        code, output = job.ended(120)
    assert code == 0, output
    assert alone[0] in output.splitlines() and output.count("Average tokens/sec") == 1, output
    for _ in range(min(20, int(os.environ.get("LLAMA_FAST_CYCLES", "1")))):
        with Launched(4, JOB, "cycle-stages", 2) as job:
            code, output = job.ended()
            assert code == 0 and not errors(output), output


@at_length
def test_speculating_stages_never_diverge() -> None:
    with Launched(2, JOB, "speculate", 2) as job:
        code, output = job.ended(240)
    assert code == 0 and "6 speculative texts alike on 2 ranks" in output, output


@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGKILL, id="a stage dies"), pytest.param(signal.SIGINT, id="Ctrl-C", marks=at_length)]
)
def test_however_it_ends_it_ends_everywhere(model: Path, how: signal.Signals) -> None:
    with Launched(2, *CLI, model, *ENDLESS, "--stages", 2) as job:
        job.wait_for("ab ")
        job.ranks()[0].kill() if how == signal.SIGKILL else job.interrupt()
        code, output = job.ended()
    assert code != 0 and len(errors(output)) == 1, output
    assert ("interrupted" if how == signal.SIGINT else "another rank has") in errors(output)[0], output


def test_ranks_that_make_no_stages(model: Path) -> None:
    with Launched(3, *CLI, model, "--stages", 2) as job:
        code, output = job.ended()
    assert code != 0 and errors(output) == ["error: stages=2 do not divide 3 ranks: each stage takes as many"], output
    with pytest.raises(ValueError, match="stages=2: no launcher started this process: use torchrun"):
        ranks.join("cpu", stages=2)


@at_length
def test_the_rungs_in_stages_are_climbed_and_judged(model: Path, tmp_path: Path) -> None:
    rungs = "pp,tp-pp" if EVERYTHING else "pp"
    flags = (
        "--device",
        "cpu",
        "--model",
        model,
        "--out",
        tmp_path,
        "--samples",
        1,
        "--new-tokens",
        4,
        "--rungs",
        rungs,
    )
    done = subprocess.run(
        [sys.executable, "-m", "llama_fast.ladder.cli", "bench", *map(str, flags)],
        env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ladder = json.loads((tmp_path / "ladder.json").read_text())
    found = {rung["name"]: (rung["ranks"], rung["verdict"], rung["plan"]) for rung in ladder["rungs"]}
    assert found["pp"][:2] == (2, "AGREE") and "2 stages" in found["pp"][2]
    whole, held = (next(rung for rung in ladder["rungs"] if rung["name"] == name) for name in ("baseline", "pp"))
    assert len(held["memory_by_rank_gb"]) == 2 and max(held["memory_by_rank_gb"]) < whole["weights_gb"]
    assert found["tp-pp"][:2] == (4, "AGREE") and "tensor parallel over 2 in 2 stages" in found["tp-pp"][2]

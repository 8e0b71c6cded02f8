"""The model of several GPUs against the rows it was not fitted to; the page that shows it; the scripts that start it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from llama_fast.build import build
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.ladder.rungs import RUNGS
from llama_fast.ladder.scaling import (
    A100,
    H200_FUSED,
    POSITIONS,
    ROWS,
    SHAPES,
    Layout,
    checked,
    error,
    predicted,
    rank_bytes,
    tables_over_nodes,
)
from llama_fast.model.roofline import cache_bytes_per_step, weight_bytes_per_step
from llama_fast.parallel.tensor_parallel import TensorParallel
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted(set((ROOT / "slurm").glob("*.sh")) - set((ROOT / "slurm").glob("replicas-*.sh")))
"""Those of rungs; those of replicas stand in tests/serve."""


@pytest.mark.parametrize("row", [row for row in ROWS if row[0] is A100], ids=lambda row: "-".join(map(str, row[1:4])))
def test_the_published_table_is_met_within_three_percent(row: tuple) -> None:  # type: ignore[type-arg]
    assert abs(error(row)) < 0.03


@pytest.mark.parametrize("encoding", [Dense(), Int8()], ids=lambda e: e.name)
def test_the_models_bytes_are_those_of_a_built_shard(untied: Checkpoint, encoding: Dense | Int8) -> None:
    """Norms and the embedding's one row apart, which the model leaves out."""
    config = untied.config
    built = build(untied, Plan(encoding, shard=TensorParallel(0, 2)), "cpu").model
    left_out = 4 * config.dim * (2 * config.n_layers + 2)
    weight_bytes = 4 if encoding.name == "dense" else 1
    kept = cache_bytes_per_step(config, 1, POSITIONS, 2) / 2
    modelled = rank_bytes(config, weight_bytes, 2) - kept
    # whole rows on either rank: what the odd vocabulary row and the scales of rows cut by columns add
    assert weight_bytes_per_step(built) - left_out == pytest.approx(
        modelled, abs=4 * config.dim + 2 * config.n_layers * 2 * 48
    )


def test_the_page_shows_what_the_model_says() -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    assert "\n".join(checked()) in page and "\n".join(predicted()) in page
    for table in tables_over_nodes():
        assert "\n".join(table) in page


def test_groups_gain_what_rows_cost_and_a_stage_more_costs_one_text_a_hop() -> None:
    config = SHAPES["70B"]
    two, one = Layout(1, 2, 1), Layout(1, 1, 1)
    t = {rows: 2 * two.stage_seconds(H200_FUSED, config, "bf16", rows) for rows in (8, 16)}
    rate = two.tokens_per_second(H200_FUSED, config, "bf16", 16)
    assert rate == pytest.approx(16 / t[8], rel=0.01) and rate > 1.1 * 16 / t[16]
    alone = [layout.tokens_per_second(H200_FUSED, config, "bf16") for layout in (one, two)]
    assert 0.99 * alone[0] < alone[1] < alone[0] == pytest.approx(H200_FUSED.tokens_per_second(config, "bf16", 1))
    assert Layout(3, 1, 1).tokens_per_second(H200_FUSED, config, "bf16", 48) == pytest.approx(
        3 * one.tokens_per_second(H200_FUSED, config, "bf16", 16)
    )
    assert not one.fits(config, "bf16") and two.fits(config, "bf16")


def test_every_rung_has_its_script() -> None:
    assert {script.stem for script in SCRIPTS} == {*RUNGS, "tp-nodes", "tp-int8-nodes", "tp-pp-nodes"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_starts_its_rung_in_the_environment_that_it_is_given(script: Path, tmp_path: Path) -> None:
    """With a scheduler and an environment that only say what they were asked."""
    (tmp_path / "bin").mkdir()
    for name in ("llama-fast", "srun"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/bash\necho "{name} $*"\n')
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/bash\nprintf 'node1\\nnode2\\n'\n")
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    (tmp_path / "bin" / "activate").write_text(f'export PATH="{tmp_path}/bin:$PATH"\n')
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    command = ["bash", str(script), str(tmp_path), "some-model", "--samples", "3"]
    done = subprocess.run(
        command, env={**os.environ, **slurm}, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    rung = script.stem.removesuffix("-nodes")
    assert f"bench --model some-model --rungs {rung} --out results/{script.stem}-7 --samples 3" in done.stdout
    assert ("--nnodes=2 --nproc-per-node=4" in done.stdout) == script.stem.endswith("-nodes")
    bare = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert bare.returncode != 0 and "the path of a virtual environment" in bare.stderr

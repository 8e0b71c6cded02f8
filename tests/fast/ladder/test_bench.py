"""The ladder climbed on a tiny model: every field there, units consistent, verdicts passed on."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.build import build, rebuild
from llama_fast.caches.static import Static
from llama_fast.compilers.graphed import Graphed
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.runner import Runner
from llama_fast.ladder import plots
from llama_fast.ladder.bench import Builder, Ladder, Witnesses, Work, bench
from llama_fast.ladder.rungs import RUNGS, Rung, rungs_named
from llama_fast.model.roofline import (
    cache_bytes_per_step,
    floor_steps_per_second,
    stored_bytes,
    weight_bytes_per_step,
)
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint

FIELDS = [
    "name",
    "plan",
    "dtype",
    "batch",
    "prompt_tokens",
    "new_tokens",
    "cache_length",
    "tokens_per_second",
    "time_to_first_token_ms",
    "bandwidth_gb_per_s",
    "mbu",
    "peak_memory_gb",
    "compile_seconds",
    "floor_tokens_per_second",
    "verdict",
]


class Quiet:
    def __init__(self) -> None:
        self.samples: list[str] = []

    def say(self, text: str) -> None:
        pass

    def sample(self, rung: str, tokens_per_second: float) -> None:
        self.samples.append(rung)


@pytest.fixture
def ladder(untied: Checkpoint) -> tuple[Ladder, Quiet]:
    def judge(runner: Runner, cache_length: int | None) -> str:
        return "AGREE" if cache_length is None else "DIFFER"

    small = Rung("int8", "int8", Plan(Int8(), cache=Static(multiple=32)), cpu_dtype=torch.bfloat16)
    quiet = Quiet()
    rungs = [RUNGS["baseline"], small]
    climbed = bench(untied, "tiny", rungs, torch.device("cpu"), Work([5, 6, 7], 20, 2), Witnesses(judge, quiet))
    return climbed, quiet


def test_the_ladder_holds_every_field_of_the_contract(ladder: tuple[Ladder, Quiet], tmp_path: Path) -> None:
    climbed, quiet = ladder
    assert quiet.samples == ["baseline", "int8", "baseline", "int8"], "samples are taken in turns"
    data = climbed.as_json()
    for rung in data["rungs"]:
        assert set(FIELDS) <= set(rung)
        assert set(rung["tokens_per_second"]) == {"median", "min", "max"}
        assert rung["mbu"] == pytest.approx(rung["bandwidth_gb_per_s"] / data["read_bandwidth_gb_per_s"])
        assert rung["mbu"] == pytest.approx(rung["tokens_per_second"]["median"] / rung["floor_tokens_per_second"])
    baseline, int8 = data["rungs"]
    assert (baseline["cache_length"], int8["cache_length"]) == (23, 32)
    assert (baseline["verdict"], int8["verdict"]) == ("AGREE", "DIFFER")
    assert (baseline["dtype"], int8["dtype"]) == ("float32", "bfloat16")
    plots.draw(climbed, tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").stat().st_size > 20_000


@pytest.mark.parametrize("room", [3, 2, 1])
def test_what_does_not_fit_at_once_is_measured_in_groups(
    untied: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: int
) -> None:
    """Memory for `room` models, and never for the largest one: int8."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def build_if_there_is_room(checkpoint: Checkpoint, plan: Plan, *where: Any) -> Runner:
        nonlocal most
        gc.collect()
        if len(alive) == room or isinstance(plan.encoding, Int8):
            raise torch.OutOfMemoryError("CUDA out of memory")
        runner = build(checkpoint, plan, *where)
        alive.add(runner.model)
        most = max(most, len(alive))
        return runner

    monkeypatch.setattr("llama_fast.ladder.bench.build", build_if_there_is_room)
    monkeypatch.setattr("llama_fast.ladder.bandwidth.read_bandwidth_gb_per_s", lambda device: 20.0)
    joined = replace(RUNGS["compiled"], name="joined", plan=Plan(fuse_projections=True))
    half = Rung("half", "half", Plan(), cpu_dtype=torch.bfloat16)
    static = Rung("static", "the baseline's weights", Plan(cache=Static()))
    rungs = [RUNGS["baseline"], static, joined, RUNGS["int8"], half]
    quiet = Quiet()
    cpu, witnesses = torch.device("cpu"), Witnesses(lambda *ignored: "AGREE", quiet)
    work = Work([5, 6, 7], 4, 2)
    climbed = bench(untied, "tiny", rungs, cpu, replace(work, trace=tmp_path / "trace.json"), witnesses)
    assert [rung.name for rung in climbed.rungs] == ["baseline", "static", "joined", "half"]
    assert climbed.as_json()["left_out"] == {"int8": "does not fit into the GPU's memory"}
    assert all(rung.step_times_us for rung in climbed.rungs) and most == min(room, 2)
    together = {3: ["joined"], 2: ["joined"], 1: []}[room]
    assert quiet.samples[: 2 + len(together)] == ["baseline", "static", *together]
    nothing = bench(untied, "tiny", [RUNGS["int8"]], cpu, work, witnesses)
    assert not nothing.rungs and list(nothing.left_out) == ["int8"]
    with pytest.raises(torch.OutOfMemoryError):  # all ranks must go one way
        bench(untied, "tiny", [replace(RUNGS["int8"], over_ranks=True)], cpu, work, witnesses)


def test_plans_that_differ_in_cache_or_compiler_share_their_weights(untied: Checkpoint) -> None:
    builder = Builder(untied, torch.device("cpu"))
    plain, static, joined, int8 = (
        builder(plan, torch.float32)
        for plan in (Plan(), Plan(cache=Static()), Plan(fuse_projections=True), Plan(Int8()))
    )
    assert static.model is plain.model and static.plan == Plan(cache=Static())
    assert len({id(runner.model) for runner in (plain, joined, int8)}) == 3
    assert builder(Plan(), torch.bfloat16).model is not plain.model
    tokens, lengths = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2])
    one, other = (runner.prefill(tokens, lengths, runner.allocate(2, 8)) for runner in (plain, static))
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="the weights of dense · growing · eager · whole are not those of int8"):
        rebuild(plain, Plan(Int8(), cache=Static()))
    with pytest.raises(ValueError, match=r"Graphed needs a cache whose addresses stay: Static\(\), not Growing\(\)"):
        rebuild(plain, Plan(compiler=Graphed()))


def test_bytes_are_counted_as_stored(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    numbers = sum(int(torch.tensor(source.shape).prod()) for source in checkpoint.weights.values())
    dense, int8 = (build(checkpoint, Plan(kind), "cpu").model for kind in (Plan().encoding, Int8()))
    assert stored_bytes(dense) == 4 * numbers
    table = 0 if config.tie_embeddings else config.vocab_size * config.dim
    assert weight_bytes_per_step(dense, batch=2) == 4 * (numbers - table + (2 * config.dim if table else 0))
    matrices = {name: source.shape for name, source in checkpoint.weights.items() if len(source.shape) == 2}
    if table:
        del matrices["tok_embeddings.weight"]
    rows = sum(shape[0] for shape in matrices.values())
    in_int8 = sum(shape[0] * shape[1] for shape in matrices.values())
    assert stored_bytes(int8) == in_int8 + 2 * rows + 4 * (numbers - in_int8)


def test_the_floor_of_the_published_shape() -> None:
    assert floor_steps_per_second(13.2e9, 3090) == pytest.approx(234.1, abs=0.1)


def test_keys_and_values_are_counted(untied: Checkpoint) -> None:
    assert cache_bytes_per_step(untied.config, 3, 10, 2) == 2 * 2 * 2 * 10 * 10 * 3 * 2


def test_rungs_are_named_and_the_baseline_leads() -> None:
    assert [rung.name for rung in rungs_named("int8,compiled")] == ["baseline", "int8", "compiled"]
    with pytest.raises(ValueError, match=r"unknown rung 'in8' \(known: baseline, compiled, int8"):
        rungs_named("in8")

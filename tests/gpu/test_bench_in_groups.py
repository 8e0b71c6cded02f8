"""A ladder that is larger than the GPU's memory: climbed in groups, and what a group held is given back, CUDA graphs too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llama_fast.build import build
from llama_fast.engine.runner import Runner
from llama_fast.ladder.bench import Witnesses, Work, bench
from llama_fast.ladder.judging import rung_judge
from llama_fast.ladder.rungs import RUNGS
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint, random_checkpoint
from llama_ref.config import NAMED

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

GB = 1e9


class Said:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def sample(self, rung: str, tokens_per_second: float) -> None:
        pass


def test_all_rungs_are_climbed_where_half_of_them_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(NAMED["llama-2-7b"], n_layers=4)  # 2.1 GB in bf16, 1.3 in int8
    device, held_before_building = torch.device("cuda"), []

    def build_if_there_is_room(checkpoint: Checkpoint, plan: Plan, *where: Any) -> Runner:
        held = torch.cuda.memory_allocated() / GB
        if held > 3.5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        held_before_building.append(round(held, 2))
        return build(checkpoint, plan, *where)

    monkeypatch.setattr("llama_fast.ladder.bench.build", build_if_there_is_room)
    checkpoint = random_checkpoint(config, 0, device, torch.bfloat16)
    rungs = [rung for rung in RUNGS.values() if not rung.over_ranks]
    said = Said()
    witnesses = Witnesses(rung_judge(checkpoint, [5, 6, 7]), said)
    climbed = bench(checkpoint, "four layers", rungs, device, Work([5, 6, 7], 20, 2), witnesses)
    print(held_before_building, [rung.peak_memory_gb for rung in climbed.rungs])
    assert [(rung.name, rung.verdict) for rung in climbed.rungs] == [(rung.name, "AGREE") for rung in rungs]
    assert "int8: does not fit beside the rungs before it, which are measured now" in said.lines
    assert min(held_before_building[2:]) < 0.3, "what the first group held was not given back"

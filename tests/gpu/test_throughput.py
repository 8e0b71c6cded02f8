"""The ladder's speed on this GPU, held against `targets.toml`. Prints measured, target and floor of every rung."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from llama_fast.ladder.bench import Ladder, Witnesses, Work, bench
from llama_fast.ladder.judging import rung_judge
from llama_fast.ladder.plots import draw
from llama_fast.ladder.report import show_step_times
from llama_fast.ladder.rungs import RUNGS, rungs_named, rungs_of
from llama_ref.models import resolve
from tests.gpu.targets import MODEL, target

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1500)]

ONLY = os.environ.get("LLAMA_FAST_GPU_RUNGS", "")  # as "fused,fused-int8"; all by default


class Printed:
    """Progress as lines of the test's output."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def sample(self, rung: str, tokens_per_second: float) -> None:
        print(f"  {rung}: {tokens_per_second:.1f} tokens/s", flush=True)


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    """Every rung that fits one process, climbed once."""
    device = torch.device("cuda")
    found = resolve(MODEL)
    checkpoint = found.open(device, torch.bfloat16)
    prompt = found.tokenizer().encode("Hello, my name is")

    judge = rung_judge(checkpoint, prompt)
    out = os.environ.get("LLAMA_FAST_LADDER_OUT")
    trace = Path(out, "trace.json") if out else None
    rungs = [rung for rung in (rungs_named(ONLY) if ONLY else rungs_of(device)) if not rung.over_ranks]
    climbed = bench(checkpoint, MODEL, rungs, device, Work(prompt, trace=trace), Witnesses(judge, Printed()))
    if out:
        show_step_times(climbed)
        Path(out, "ladder.json").write_text(json.dumps(climbed.as_json(), indent=2) + "\n")
        draw(climbed, Path(out, "ladder.png"))
    return climbed


@pytest.mark.parametrize("name", [name for name, rung in RUNGS.items() if not (rung.over_ranks or rung.needs_cpu)])
def test_a_rung_reaches_its_target(ladder: Ladder, name: str) -> None:
    rung = next((rung for rung in ladder.rungs if rung.name == name), None)
    if rung is None and ONLY:
        pytest.skip(f"only {ONLY} was asked for")
    assert rung is not None, f"{name}: {ladder.left_out[name]}"
    goal, source = target(rung, ladder.device)
    reached = rung.tokens_per_second.median
    print(
        f"{name} on {ladder.device}: measured {reached:.1f} tokens/s "
        f"({rung.tokens_per_second.min:.1f}-{rung.tokens_per_second.max:.1f}), target {goal:.1f} ({source}), "
        f"floor {rung.floor_tokens_per_second:.1f} at {ladder.read_bandwidth_gb_per_s:.0f} GB/s read"
    )
    if rung.speculation is not None:
        print("  ", rung.speculation)
    assert rung.verdict == "AGREE"
    assert reached >= goal

"""What does the engine itself cost? Its tokens/s against bare replays of the step that it records, and the time of its host.

    python -m tests.instruments.engine_cost --model random:llama-2-7b          # on a GPU: fused, 8, 32 and 64 rows
    python -m tests.instruments.engine_cost --stub                             # the host alone: a model that computes nothing

Bare replays are of the graph that the engine replays, one behind another, at the position in the middle of what the engine writes
meanwhile. The engine's rows are read first; timed are steps of all rows, in one piece, of as many tokens each (medians of
--repeats). The account is of a run of its own: microseconds a step that the host spends in each part, `waits` for the device.
A host that waits is not what holds the device up. With --stub all is the thread's own time, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.compilers import graphed
from llama_fast.compilers.graphed import Recorded, Recordings
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request, Row
from llama_fast.engine.runner import Runner
from llama_fast.engine.steps import PlainSteps
from llama_fast.engine.transfer import Readback
from llama_fast.plan import Plan
from llama_fast.recipes import encoding_named, fused, paged
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.models import resolve

PROMPT, WARM = 6, 8
"""Tokens of a prompt; steps before the clock starts: of as many as are on their way, and as many again."""
CONFIG = LlamaConfig(16, 1, 2, 1, 8, 16, 128, 4096)
PARTS: dict[str, tuple[Any, str]] = {
    "launches (model)": (Runner, "step"),
    "sends tokens": (Readback, "push"),
    "waits": (Readback, "pop"),
    "launches (all)": (PlainSteps, "launch"),
    "takes": (PlainSteps, "take"),
    "makes room": (Engine, "_make_room"),
    "reads prompts": (Engine, "_read"),
    "frees slots": (Engine, "_leave_launched"),
    "rows go on": (Row, "take"),
}
"""Where the host's time goes; `launches (all)` holds the first two, `takes` holds `waits`."""


Clock = Callable[[], float]


def clock_of(runner: Runner) -> Clock:
    """Time as it passes, or on a CPU the thread's own."""
    return time.perf_counter if runner.device.type == "cuda" else time.thread_time


def stub() -> Runner:
    """A runner whose model computes nothing: what is left is the host's own work."""
    runner = build(random_checkpoint(CONFIG, 0), Plan(cache=Static()), "cpu")
    logits: dict[int, Tensor] = {}

    def nothing(model: Any, tokens_BT: Tensor, where: Any, cache: Any, choose: Any) -> tuple[Tensor, Tensor]:
        B = len(tokens_BT)
        logits_BTV = logits.setdefault(B, torch.zeros(B, 1, CONFIG.vocab_size))
        return tokens_BT[:, 0], logits_BTV

    def nothing_read(*arguments: Any) -> tuple[Tensor, Tensor]:
        token_B, logits_BTV = nothing(*arguments)
        return token_B, logits_BTV[:, 0]

    return dataclasses.replace(runner, run_prefill=nothing_read, run_decode=nothing)


def started(runner: Runner, rows: int, tokens: int, cache: Any) -> Engine:
    """An engine whose rows have their prompts read, and some steps behind them."""
    engine = Engine(runner, rows, PROMPT + tokens + 2 * WARM, cache)
    vocabulary = runner.config.vocab_size
    for row in range(rows):
        engine.add(Request([(7 * row + i) % vocabulary for i in range(PROMPT)], tokens + 2 * WARM))
    for _ in range(WARM):
        engine.step()
    return engine


def rate(runner: Runner, rows: int, tokens: int, cache: Any) -> float:
    """Tokens/s of the running engine."""
    engine = started(runner, rows, tokens, cache)
    synchronize(runner)
    clock = clock_of(runner)
    began, found = clock(), 0
    for _ in range(tokens):
        found += len(engine.step())
    synchronize(runner)
    seconds = clock() - began
    assert found == rows * tokens, f"{found} tokens of {rows} rows in {tokens} steps"
    engine.close()
    return found / seconds


def account(runner: Runner, rows: int, tokens: int, cache: Any) -> dict[str, float]:
    """Microseconds a step of the host in each part, and in all."""
    engine = started(runner, rows, tokens, cache)
    spent, clock = defaultdict[str, float](float), clock_of(runner)
    with ExitStack() as stack:
        for name, (owner, method) in PARTS.items():
            stack.enter_context(patch.object(owner, method, timed(spent, name, getattr(owner, method), clock)))
        began = clock()
        for _ in range(tokens):
            engine.step()
        spent["all"] = clock() - began
    engine.close()
    return {name: seconds / tokens * 1e6 for name, seconds in spent.items()}


def timed(spent: dict[str, float], name: str, method: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    """The method, which adds up the seconds that it takes."""

    def measured(*arguments: Any, **options: Any) -> Any:
        began = clock()
        try:
            return method(*arguments, **options)
        finally:
            spent[name] += clock() - began

    return measured


def replays(recorded: Recorded, rows: int, tokens: int) -> float:
    """Tokens/s of a recorded step, one replay behind another."""
    recorded.inputs[1].fill_(PROMPT + WARM + tokens // 2)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(tokens):
        recorded.graph.replay()
    torch.cuda.synchronize()
    return rows * tokens / (time.perf_counter() - began)


def synchronize(runner: Runner) -> None:
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)


def report(runner: Runner, rows: int, tokens: int, repeats: int) -> None:
    made: list[Recorded] = []
    record = Recordings.record

    def kept(self: Recordings, *arguments: Any) -> Recorded:
        made.append(record(self, *arguments))
        return made[-1]

    with patch.object(graphed.Recordings, "record", kept):
        cache = runner.allocate(rows, PROMPT + tokens + 2 * WARM)
        rate(runner, rows, tokens, cache)
    steps = [one for one in made if one.inputs[0].shape == (rows, 1) and len(one.inputs) == 2]
    line, bare, own = f"{rows:3} rows:", [], []
    for _ in range(repeats):
        if steps:
            bare.append(replays(steps[0], rows, tokens))
        own.append(rate(runner, rows, tokens, cache))
    engine = median(own)
    line += f" engine {engine:9.1f} tokens/s ({rows / engine * 1e6:.1f} us a step)"
    if bare:
        line += f", bare replays {median(bare):9.1f}, {engine / median(bare):.3f} of them"
    print(line, flush=True)
    parts = account(runner, rows, tokens, cache)
    print("    host, us a step: " + ", ".join(f"{name} {us:.1f}" for name, us in parts.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-2-7b")
    parser.add_argument("--encoding", default="dense")
    parser.add_argument("--cache", default="static", choices=("static", "paged"))
    parser.add_argument("--rows", default="8,32,64")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stub", action="store_true", help="on a CPU, a model that computes nothing")
    given = parser.parse_args()
    if given.stub:
        runner = stub()
        runner = runner if given.cache == "static" else with_pages(runner)
    else:
        device = torch.device("cuda")
        plan = fused(encoding_named(given.encoding))
        plan = plan if given.cache == "static" else paged(plan, None)
        runner = build(resolve(given.model).open(device, torch.bfloat16), plan, device, torch.bfloat16)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {given.model}, {plan}", flush=True)
    for rows in map(int, given.rows.split(",")):
        report(runner, rows, given.tokens, given.repeats)


def with_pages(runner: Runner) -> Runner:
    """The same runner over a cache in pages."""
    return dataclasses.replace(runner, plan=paged(runner.plan, None))


if __name__ == "__main__":
    main()

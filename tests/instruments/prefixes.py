"""What a kept prefix gives the first token of a repeated prompt, and chunks the longest gap between a running text's tokens.

    python -m tests.instruments.prefixes [--model smollm2-135m] [--prompt 2000] [--chunks 64,256] [--rounds 3]

One engine of two rows after another, uncompiled, on the default device; the median of some rounds of other prompts each.
"""

from __future__ import annotations

import argparse
import statistics
import time

from llama_fast.build import build
from llama_fast.devices import default_dtype, where
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request
from llama_fast.engine.runner import Runner
from llama_fast.plan import Plan
from llama_fast.recipes import optimised, paged
from llama_ref.models import resolve


def prompt(length: int, number: int) -> list[int]:
    return [(37 * i + 11 * number) % 4000 + 5 for i in range(length)]


def seconds_to_first(engine: Engine, ids: list[int]) -> float:
    began, wanted = time.perf_counter(), engine.add(Request(ids, 1))
    while not any(event.id == wanted for event in engine.step()):
        pass
    return time.perf_counter() - began


def first_tokens(runner: Runner, length: int, rounds: int) -> str:
    engine, first, again = Engine(runner, 2, length + 8), [], []
    for number in range(rounds):
        first.append(seconds_to_first(engine, prompt(length, number)))
        again.append(seconds_to_first(engine, prompt(length, number)))
    reused = engine.reused_tokens // rounds
    return f"{statistics.median(first):.3f} s, again {statistics.median(again):.3f} s, {reused} tokens reused"


def gap(runner: Runner, length: int, rounds: int, chunk: int | None) -> str:
    """The longest time between two tokens of a text beside which a long prompt comes, and that prompt's first token."""
    gaps, firsts = [], []
    for number in range(rounds):
        engine = Engine(runner, 2, length + 8, chunk=chunk)
        running = engine.add(Request(prompt(8, number), min(length, 400)))
        for _ in range(5):
            engine.step()
        began = last = time.perf_counter()
        late, longest, first = engine.add(Request(prompt(length, number), 1)), 0.0, 0.0
        while not first or last < began + first:  # up to the running text's next token behind it
            events, now = engine.step(), time.perf_counter()
            if any(event.id == late for event in events):
                first = now - began
            if any(event.id == running for event in events):
                longest, last = max(longest, now - last), now
        gaps.append(longest)
        firsts.append(first)
        engine.close()
    return f"longest gap {statistics.median(gaps):.3f} s, the prompt's first token {statistics.median(firsts):.3f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--chunks", default="64,256")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    device = where(None)
    dtype = default_dtype(device)
    checkpoint = resolve(asked.model).open(device, dtype)
    plans: dict[str, Plan] = {"static": optimised(compile=False), "paged": paged(optimised(compile=False))}
    for name, plan in plans.items():
        runner = build(checkpoint, plan, device, dtype)
        print(f"{name}: a prompt of {asked.prompt}: {first_tokens(runner, asked.prompt, asked.rounds)}", flush=True)
        for chunk in (None, *map(int, asked.chunks.split(","))):
            print(f"{name}, chunk {chunk}: {gap(runner, asked.prompt, asked.rounds, chunk)}", flush=True)


if __name__ == "__main__":
    main()

"""tokens/s against the number of rows, and the first token of a prompt and of a second turn, on a GPU.

    python tests/instruments/rows.py [--model random:llama-2-7b] [--encoding dense] [--rows 1,2,4,8,9,12,16,24,32,48,64]

Every row has a prompt of 6 tokens and gets 64 new ones (200 where it is alone), greedily, in a cache that is kept. Printed
are new tokens of all rows over the time of prefill and decode (median of 5 generations after the first), the same of decode
alone, the time to the first tokens, and that of the first generation, which compiles and records.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from llama_fast.build import build
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner
from llama_fast.recipes import encoding_named, fused, optimised
from llama_ref.models import resolve

SLOTS, PROMPT, TURN = 256, 100, 20


def rates(runner: Runner, rows: int) -> str:
    prompts = [[(7 * row + i) % 1000 + 1 for i in range(6)] for row in range(rows)]
    cache, new = runner.allocate(rows, SLOTS), 200 if rows == 1 else 64
    began = time.perf_counter()
    generate(runner, prompts, new, cache=cache)
    cold = time.perf_counter() - began
    done = [generate(runner, prompts, new, cache=cache) for _ in range(5)]
    whole = statistics.median(one.tokens_per_second for one in done)
    decode = statistics.median(one.decode_tokens_per_second for one in done)
    first = statistics.median(one.first_token_seconds for one in done)
    return (
        f"{rows:3} rows: {whole:8.1f} tokens/s (decode {decode:8.1f}), first {first * 1e3:6.2f} ms, cold {cold:.2f} s"
    )


def first_tokens(runner: Runner) -> str:
    """Milliseconds of the first token of a prompt of TURN tokens, of as many behind PROMPT, and of a prompt of 2,048."""
    device, sampler = runner.device, runner.greedy(1)
    tokens_1T = torch.arange(1, 2049, device=device)[None] % 1000
    short, long = runner.allocate(1, SLOTS), runner.allocate(1, 2304)

    def milliseconds(call: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(7):
            torch.cuda.synchronize()
            began = time.perf_counter()
            call()[0].tolist()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:]) * 1e3

    def prompt(count: int, cache: Any) -> Callable[[], Any]:
        return lambda: runner.start(tokens_1T[:, :count], torch.tensor([count], device=device), cache, sampler)

    first = milliseconds(prompt(TURN, short))
    prompt(PROMPT, short)()
    counts = torch.tensor([PROMPT], device=device), torch.tensor([TURN], device=device)
    second = milliseconds(lambda: runner.extend(tokens_1T[:, PROMPT : PROMPT + TURN], *counts, short, sampler))
    whole = milliseconds(prompt(2048, long))
    return f"a prompt of {TURN}: {first:.2f} ms, behind {PROMPT}: {second:.2f} ms, a prompt of 2048: {whole:.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-2-7b")
    parser.add_argument("--encoding", default="dense")
    parser.add_argument("--plan", default="fused", choices=("fused", "compiled"))
    parser.add_argument("--rows", default="1,2,4,8,9,12,16,24,32,48,64")
    options = parser.parse_args()
    device, encoding = torch.device("cuda"), encoding_named(options.encoding)
    plan = fused(encoding) if options.plan == "fused" else optimised(encoding, compile=True)
    runner = build(resolve(options.model).open(device, torch.bfloat16), plan, device, torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.model}, {plan}", flush=True)
    for rows in options.rows.split(","):
        print(rates(runner, int(rows)), flush=True)
    print(first_tokens(runner), flush=True)


if __name__ == "__main__":
    main()

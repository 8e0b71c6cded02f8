"""tokens/s of steps far behind the beginning, with keys and values in the arithmetic's type and in eight bits, on a GPU.

    python tests/instruments/long_context.py [--model random:llama-2-7b] [--encoding dense,int4] [--cases 1x4000,8x2000,32x1000]

A case is rows x position. Steps are taken at that position of every row again and again, in turns of the two caches, which hold
zeros: what is read is as much as in a text. Printed are the medians of some rounds, and bytes of the caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import torch

from llama_fast.build import build, rebuild
from llama_fast.caches.paged import Paged
from llama_fast.caches.static import Static
from llama_fast.contracts import KVCache
from llama_fast.engine.runner import Runner
from llama_fast.recipes import encoding_named, fused
from llama_ref.models import resolve

KINDS = {"static": Static(), "static, 8 bits": Static(bits=8), "paged": Paged(), "paged, 8 bits": Paged(bits=8)}
STEPS, ROUNDS = 20, 5


def seconds(runner: Runner, cache: KVCache, rows: int, position: int) -> float:
    token_B1 = torch.ones(rows, 1, dtype=torch.int64, device="cuda")
    start_B = torch.full((rows,), position, device="cuda")
    choose = runner.greedy(rows)
    runner.step(token_B1, start_B, cache, choose)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        runner.step(token_B1, start_B, cache, choose)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-2-7b")
    parser.add_argument("--encoding", default="dense,int4")
    parser.add_argument("--cases", default="1x4000,8x2000,32x1000")
    asked = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {asked.model}")
    for name in asked.encoding.split(","):
        checkpoint = resolve(asked.model).open(torch.device("cuda"), torch.bfloat16)
        runner = build(checkpoint, fused(encoding_named(name)), "cuda", torch.bfloat16)
        for case in asked.cases.split(","):
            rows, position = map(int, case.split("x"))
            runners = {kind: rebuild(runner, dataclasses.replace(runner.plan, cache=of)) for kind, of in KINDS.items()}
            caches = {kind: one.allocate(rows, position + 8) for kind, one in runners.items()}
            found: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for _ in range(ROUNDS):
                for kind, one in runners.items():
                    found[kind].append(seconds(one, caches[kind], rows, position))
            plain = statistics.median(found["static"])
            for kind, each in found.items():
                took = statistics.median(each)
                print(
                    f"{name} {rows} rows at {position}, {kind}: {rows / took:8.1f} tokens/s, {plain / took:.3f}x of static "
                    f"({min(each) / took:.3f}-{max(each) / took:.3f}), cache {caches[kind].nbytes / 1e9:.2f} GB"
                )
            del caches, runners
        del runner, checkpoint
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

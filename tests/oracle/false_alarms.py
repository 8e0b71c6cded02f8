"""Count false alarms: every lawful variation on models, texts and orders of summation of many seeds.

    python tests/oracle/false_alarms.py [--seeds 200] [--processes 2]

Each trial asks stages and logits by all routes, and of what is a plan or a replacement also requests of unusual shapes, the
window, the library's face, seeds and objects, in float32 for even seeds and in bfloat16 for odd ones. No alarm in n
trials bounds their rate at 3 / n with 95% confidence (the rule of three). Exit 1 if there is one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from dataclasses import replace

import pytest
import torch
import trials
from variations import VARIATIONS

from conftest import TINY
from llama_ref.checkpoint import random_checkpoint
from oracle.statistics.compare import Outcome

SHAPES = (
    TINY,
    replace(TINY, n_heads=6, n_kv_heads=1, head_dim=16, tie_embeddings=True),
    replace(TINY, dim=96, n_heads=4, n_kv_heads=4, ffn_dim=160, n_layers=1),
    replace(TINY, dim=40, head_dim=32, n_heads=2, n_kv_heads=2, ffn_dim=200, attention_bias=True),
)


def trial(task: tuple[int, int]) -> tuple[str, float, str]:
    """(variation, the largest share of a budget that was used, what failed in words)."""
    seed, index = task
    torch.set_num_threads(1)
    variation = VARIATIONS[index]
    checkpoint = random_checkpoint(SHAPES[seed % len(SHAPES)], seed)
    dtype = torch.float32 if seed % 2 == 0 else torch.bfloat16
    with pytest.MonkeyPatch.context() as patch:
        found = variation.tried(checkpoint, dtype, seed, patch)
        found = trials.Found(found.parts | variation.asked_more(checkpoint, dtype, patch).parts)
    used = max((check.measured / check.budget for check in found.verdict.checks if check.budget > 0), default=0.0)
    failed = "" if found.verdict.outcome is Outcome.AGREE else f"{found.verdict.outcome.value} {found.words}"
    return variation.name, used, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    seeds = range(asked.first, asked.first + asked.seeds)
    tasks = [(seed, index) for seed in seeds for index in range(len(VARIATIONS))]
    began, alarms = time.perf_counter(), 0
    used: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(asked.processes) as pool:
        for (seed, _), (name, share, failed) in zip(tasks, pool.imap(trial, tasks, chunksize=8)):
            used[name] = max(used.get(name, 0.0), share)
            if failed:
                alarms += 1
                print(f"FALSE ALARM seed {seed}, {name}: {failed}", flush=True)
    for name, share in sorted(used.items(), key=lambda item: -item[1]):
        print(f"{share:6.1%} of a budget at most: {name}")
    n = len(tasks)
    took = time.perf_counter() - began
    print(f"{alarms} false alarms in {n} trials ({len(seeds)} seeds x {len(VARIATIONS)} variations), {took:.0f} s")
    if not alarms:
        print(f"so their rate is below {3 / n:.2g} with 95% confidence (3 / {n})")
    sys.exit(int(alarms > 0))


if __name__ == "__main__":
    main()

"""Speculation on this CPU, in pairs: the same plan with an n-gram lookup and without, one after the other, in turns.

    python tests/instruments/speculation.py [--dtype bfloat16] [--pairs 12] [--tokens 160] [--eager] [--json FILE]

A pair is one prompt continued greedily with automatic speculation and plainly, the order changing from pair to pair; a drift
of the machine then falls on both. The ratio of a pair is its plain time over its speculative time. Copy-heavy prompts
must reach a median of 1.5 in bf16; where nothing can be won, the lower 95% bound of the mean ratio must reach 0.95.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_fast.build import build
from llama_fast.contracts import KVCache
from llama_fast.encodings.dense import Dense
from llama_fast.engine.generate import Generation, generate
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import Sampling
from llama_fast.recipes import optimised
from llama_fast.speculative.proposers import Ngram
from llama_ref.models import resolve
from llama_ref.tokenizers.contract import Tokenizer

PASSAGE = (
    "The lighthouse at Carrow Point was built in 1841 by the engineer Elias Thornbury, who had lost two brothers to the "
    "reef below it. Its lamp burned whale oil for thirty years, then paraffin, and since 1962 it has run on electricity "
    "from a small turbine behind the keeper's cottage. The tower is 38 metres high and has 212 steps; visitors may climb "
    "it on Tuesdays and Saturdays between April and October, if the wind stays below 40 knots."
)
COPY = {
    "a passage copied": f"Original:\n{PASSAGE}\n\nCopy:\n{PASSAGE}\n\nCopy:\n{PASSAGE[:80]}",
    "code continued": (
        "def area_of_square(side):\n    return side * side\n\n\n"
        "def area_of_circle(radius):\n    return 3.14 * radius * radius\n\n\n"
    )
    * 2
    + "def area_of_square(side):",
}
HOPELESS = {
    "random ids, sampled": None,
    "prose, sampled": "<|im_start|>user\nTell me an unusual story about a clockmaker.<|im_end|>\n<|im_start|>assistant\n",
}
STUDENT_95 = {5: 2.015, 7: 1.895, 9: 1.833, 11: 1.796, 15: 1.753, 19: 1.729, 23: 1.714, 29: 1.699}
"""One-sided 95% points of Student's t by degrees of freedom."""


@dataclass
class Pairs:
    """Ratios plain time / speculative time, and the last speculative generation."""

    ratios: list[float]
    last: Generation

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def lower(self) -> float:
        """The lower 95% bound of the mean."""
        degrees = len(self.ratios) - 1
        t = STUDENT_95[max([d for d in STUDENT_95 if d <= degrees] or [5])]
        return statistics.fmean(self.ratios) - t * statistics.stdev(self.ratios) / math.sqrt(degrees + 1)


def measure(target: Runner, cache: KVCache, prompt: list[int], tokens: int, pairs: int, sampled: bool) -> Pairs:
    draft = Ngram()

    def once(seed: int, speculative: bool) -> Generation:
        sampling = Sampling(temperature=1.0, seed=seed) if sampled else Sampling()
        return generate(target, [prompt], tokens, sampling, cache=cache, draft=draft if speculative else None)

    for speculative in (True, False):
        once(0, speculative)  # compiles
    ratios = []
    for pair in range(pairs):
        seconds = {}
        for speculative in (True, False) if pair % 2 else (False, True):
            done = once(pair, speculative)
            seconds[speculative] = done.total_seconds
        ratios.append(seconds[False] / seconds[True])
    return Pairs(ratios, once(pairs, True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    dtype = getattr(torch, asked.dtype)
    found = resolve("smollm2-135m")
    tokenizer: Tokenizer = found.tokenizer()
    target = build(found.open("cpu", dtype), optimised(Dense(), not asked.eager), "cpu", dtype)
    cache = target.allocate(1, 512)
    results: dict[str, Any] = {"plan": str(target.plan), "dtype": asked.dtype, "threads": torch.get_num_threads()}
    failed = False
    for kind, prompts in (("copy", COPY), ("hopeless", HOPELESS)):
        for name, text in prompts.items():
            ids = tokenizer.encode(text) if text else [(7919 * i) % 49000 + 50 for i in range(80)]
            pairs = measure(target, cache, ids, asked.tokens, asked.pairs, sampled=kind == "hopeless")
            good = pairs.median >= 1.5 if kind == "copy" else pairs.lower >= 0.95
            failed |= not good and asked.dtype == "bfloat16"
            counted = pairs.last.speculation
            assert counted is not None
            bar = "median >= 1.5" if kind == "copy" else "lower bound >= 0.95"
            print(
                f"{kind}: {name}: median ratio {pairs.median:.3f}, lower 95% bound of the mean {pairs.lower:.3f} "
                f"({len(pairs.ratios)} pairs; {bar}: {'MET' if good else 'NOT MET'}); prompt {len(ids)} tokens"
            )
            print("  " + "\n  ".join(counted.lines()))
            print(f"  check cost {counted.check_cost}, last {pairs.last.tokens_per_second:.1f} tokens/s", flush=True)
            results[name] = {"ratios": pairs.ratios, "median": pairs.median, "lower": pairs.lower}
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""What the ranks of a test do, started by `python -m torch.distributed.run`; each group of checks is one word.

A rank holds the whole tiny model beside its shard, so it can judge by itself.
"""

from __future__ import annotations

import dataclasses
import sys

import torch

from llama_fast.build import build
from llama_fast.optimisations.compiled import Compiled
from llama_fast.optimisations.int8 import Int8
from llama_fast.optimisations.static_cache import Static
from llama_fast.plan import Dense, Eager, Encoding, Growing, Plan
from llama_fast.ranks import tensor_parallel
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.adapters import FastSubject
from oracle.cases import standard_case
from oracle.judge import Bench, judge
from oracle.verify import references

TWELVE = LlamaConfig(
    dim=96, n_layers=2, n_heads=12, n_kv_heads=12, head_dim=8, ffn_dim=144, vocab_size=301, max_context=192
)
SHAPES = {
    "plain": TWELVE,
    "tied": dataclasses.replace(TWELVE, n_kv_heads=2, tie_embeddings=True),
    "one": dataclasses.replace(TWELVE, n_kv_heads=1, head_dim=10),
    "four": dataclasses.replace(TWELVE, n_kv_heads=4),
}


def agree(shapes: list[str], dtypes: list[torch.dtype], encodings: list[Encoding], compile: bool) -> int:
    """The oracle's full question, ragged batches and all, of every shape that divides; how many were asked."""
    asked = 0
    with tensor_parallel("cpu") as shard:
        for name in shapes:
            config = SHAPES[name]
            if config.n_kv_heads % shard.size and shard.size % config.n_kv_heads:
                continue
            checkpoint = random_checkpoint(config, 3, "cpu", torch.float32)
            case = standard_case(config.vocab_size, 80)
            for dtype in dtypes:
                for encoding in encodings:
                    torch._dynamo.reset()
                    cache = Static() if compile else Growing()
                    plan = Plan(encoding, cache, Compiled() if compile else Eager(), shard, fuse_projections=compile)
                    runner = build(checkpoint, plan, "cpu", dtype)
                    subject = FastSubject(runner, batch=len(case.rows), cache_length=case.longest if compile else None)
                    verdict = judge(subject, Bench(*references(runner, checkpoint)), case)
                    assert verdict.outcome.value == "AGREE", f"{name}, {plan}, {dtype}: {verdict}"
                    asked += 1
        if shard.rank == 0:
            print(f"{asked} verdicts AGREE on {shard.size} ranks")
    return asked


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "agree":
        shapes = list(SHAPES) if words[0] == "all" else words[0].split(",")
        dtypes = [getattr(torch, word) for word in words[1].split(",")]
        encodings: list[Encoding] = [{"dense": Dense(), "int8": Int8()}[word] for word in words[2].split(",")]
        assert agree(shapes, dtypes, encodings, compile="compiled" in words)

"""What the ranks of a test do, started by `python -m torch.distributed.run`; each group of checks is one word.

A rank holds the whole tiny model beside its shard, so it can judge by itself.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from llama_fast.arithmetic.pytorch import PyTorch
from llama_fast.build import build
from llama_fast.caches.growing import Growing
from llama_fast.caches.paged import Paged
from llama_fast.caches.static import Static
from llama_fast.compilers.compiled import Compiled
from llama_fast.compilers.eager import Eager
from llama_fast.contracts import Encoding
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.generate import generate
from llama_fast.engine.sampling import Sampling
from llama_fast.model.roofline import stored_bytes
from llama_fast.parallel.ranks import explained, fail, in_stages, tensor_parallel
from llama_fast.plan import Plan
from llama_fast.recipes import encoding_named
from llama_fast.speculative.proposers import Draft, Ngram
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.models import resolve
from oracle.questions.cases import standard_case
from oracle.questions.face import Faces
from oracle.questions.judge import Bench, judge
from oracle.questions.slots import judge_slots
from oracle.subjects.fast import FastSubject
from oracle.subjects.walkers import HEADS, walker
from oracle.verify import for_small_models, judge_runner, references

TWELVE = LlamaConfig(
    dim=96, n_layers=2, n_heads=12, n_kv_heads=12, head_dim=8, ffn_dim=144, vocab_size=301, max_context=192
)
SHAPES = {
    "plain": TWELVE,
    "tied": replace(TWELVE, n_kv_heads=2, tie_embeddings=True),
    "one": replace(TWELVE, n_kv_heads=1, head_dim=10),
    "four": replace(TWELVE, n_kv_heads=4),
}
DEEPER = replace(TWELVE, n_layers=4, head_dim=16, ffn_dim=192)
FAMILIES = {
    "llama2": DEEPER,
    "llama3": replace(DEEPER, n_kv_heads=6, tie_embeddings=True, rope_theta=500000.0),
    "biased": replace(DEEPER, n_layers=3, n_kv_heads=6, attention_bias=True, window=40),
}
"""Of four layers and three, so that stages of unequal depth are among them."""


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


def stages_agree(stages: int, families: list[str], encodings: list[str], caches: list[str], how: str) -> int:
    """The oracle's full question of models in stages, and rows of an engine that join and leave; how many were asked."""
    asked = 0
    with in_stages("cpu", stages) as shard:
        for family, encoding, cache in itertools.product(families, encodings, caches):
            torch._dynamo.reset()
            config = FAMILIES[family]
            checkpoint = random_checkpoint(config, 3, "cpu", torch.float32)
            case = standard_case(config.vocab_size, 60)
            of_cache = {"growing": Growing(), "static": Static(), "paged": Paged()}[cache]
            compiled = how == "compiled"
            plan = Plan(
                encoding_named(encoding), of_cache, Compiled() if compiled else Eager(), shard, PyTorch(), compiled
            )
            runner = build(checkpoint, plan, "cpu", torch.float32)
            subject = FastSubject(runner, batch=len(case.rows), cache_length=case.longest if compiled else None)
            verdict = judge(subject, Bench(*references(runner, checkpoint)), case)
            if HEADS % (dist.get_world_size() // stages) == 0:
                eager = replace(plan, compiler=Eager())
                walks, _ = for_small_models(eager, torch.device("cpu"), [walker(layers=stages)])
                verdict += judge_slots(Faces(walks, torch.device("cpu")))
            assert verdict.outcome.value == "AGREE", f"{family}, {plan}: {verdict}"
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, verdict.outcome.value)
            assert everyone == ["AGREE"] * len(everyone)
            asked += 1
        if dist.get_rank() == 0:
            print(f"{asked} verdicts AGREE on {dist.get_world_size()} ranks in {stages} stages")
    return asked


def default_model() -> None:
    """The model that everybody has, over as many ranks as there are; eager, as a step of a benchmark is judged."""
    with tensor_parallel("cpu") as shard:
        checkpoint = resolve().open()
        for encoding in (Dense(), Int8()):
            runner = build(checkpoint, Plan(encoding, Static(), shard=shard, fuse_projections=True), "cpu")
            verdict = judge_runner(runner, checkpoint, cache_length=256)
            assert verdict.outcome.value == "AGREE", f"{encoding.name}: {verdict}"
            held = stored_bytes(runner.model) / stored_bytes(build(checkpoint, Plan(encoding), "cpu").model)
            if shard.rank == 0:
                print(f"default model, {encoding.name}: AGREE on {shard.size} ranks, {held:.2f} of the weights on each")


def speculate(stages: int = 1) -> None:
    """Every rank must propose, accept and draw alike: the same number of tokens a round, chosen from measured times."""
    target, small = (replace(TWELVE, n_layers=layers * stages) for layers in (2, 1))
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3]]
    compared = 0
    with in_stages("cpu", stages) as shard:
        plan = Plan(cache=Static(), shard=shard)
        runner = build(random_checkpoint(target, 3), plan, "cpu")
        alone = build(random_checkpoint(target, 3), Plan(cache=Static()), "cpu")
        of_target, of_small = (random_checkpoint(config, 3) for config in (target, small))
        drafts = {
            "a sharded draft": lambda: Draft(build(of_small, plan, "cpu"), k=3),
            "its own int8, k measured": lambda: Draft(build(of_target, Plan(Int8(), Static()), "cpu")),
            "n-gram, k measured": lambda: Ngram(),
        }
        for name, draft in drafts.items():
            for sampling in (Sampling(), Sampling(0.9, top_k=50, seed=7)):
                done = generate(runner, prompts, 60, sampling, draft=draft())
                mine = [completion.tokens for completion in done.completions]
                everyone: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, mine)
                assert all(other == mine for other in everyone), f"{name}: the ranks' texts differ"
                if sampling.temperature == 0:
                    plain = [completion.tokens for completion in generate(alone, prompts, 60).completions]
                    assert mine == plain, f"{name}: not what one rank writes without a draft"
                compared += 1
        if dist.get_rank() == 0:
            print(f"{compared} speculative texts alike on {dist.get_world_size()} ranks")


def cycle() -> None:
    """Join, say something, leave."""
    with tensor_parallel("cpu") as shard:
        total = shard.all_reduce(torch.full((3,), float(shard.rank + 1)))
        assert total.tolist() == [shard.size * (shard.size + 1) / 2] * 3


def cycle_stages(stages: int) -> None:
    """Join in stages, say something to everybody and to the next stage, leave."""
    with in_stages("cpu", stages) as shard:
        assert shard.line is not None
        size = dist.get_world_size()
        total = shard.everyone(torch.full((3,), float(dist.get_rank() + 1)))
        assert total.tolist() == [size * (size + 1) / 2] * 3
        hidden = torch.zeros(2, 3, 4) if shard.line.first else shard.line.take(torch.empty(2, 3, 4))
        if not shard.line.last:
            shard.line.give(hidden + 1)
        token_B, logits = shard.line.tell(torch.full((2,), int(hidden.sum())), hidden)()
        assert token_B.tolist() == [24 * (stages - 1)] * 2 and (logits == stages - 1).all()


def absent() -> None:
    """Rank 1 lives and beats, but does not come to the sum."""
    with tensor_parallel("cpu", collective_seconds=3) as shard:
        if shard.rank == 1:
            time.sleep(1000)
        shard.all_reduce(torch.zeros(3))


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    alone: dict[str, Callable[[], None]] = {"cycle": cycle, "default": default_model}
    if what in alone:
        alone[what]()
    if what == "speculate":
        speculate(*map(int, words))
    if what == "absent":
        try:
            absent()
        except RuntimeError as error:
            fail(explained(error), 1)
    if what == "agree":
        shapes = list(SHAPES) if words[0] == "all" else words[0].split(",")
        dtypes = [getattr(torch, word) for word in words[1].split(",")]
        encodings: list[Encoding] = [{"dense": Dense(), "int8": Int8()}[word] for word in words[2].split(",")]
        assert agree(shapes, dtypes, encodings, compile="compiled" in words)
    if what == "cycle-stages":
        cycle_stages(int(words[0]))
    if what == "stages":
        assert stages_agree(int(words[0]), *(word.split(",") for word in words[1:4]), words[4])

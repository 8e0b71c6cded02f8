"""Speculation compiled: the same tokens, and nothing is compiled again however many proposals stand. Slow: one tiny model."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.compilers.compiled import Compiled
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.generate import generate
from llama_fast.engine.sampling import Sampling
from llama_fast.plan import Plan
from llama_fast.speculative.proposers import Draft, Ngram
from llama_ref.checkpoint import Checkpoint
from oracle.questions.speculation import judge_speculation

pytestmark = pytest.mark.usefixtures("two_threads")

PROMPTS = [[5, 17, 3], [4, 4, 4, 61, 20, 9, 33]]
NEW = 24


@pytest.mark.parametrize("kind", ["draft", "ngram"])
def test_compiled_once_whatever_is_accepted(untied: Checkpoint, kind: str) -> None:
    torch._dynamo.reset()
    static = Static(length=64)
    target, small = (
        build(untied, Plan(encoding, static, Compiled(), fuse_projections=True), "cpu")
        for encoding in (Dense(), Int8())
    )
    plain = generate(build(untied, Plan(cache=static, fuse_projections=True), "cpu"), PROMPTS, NEW)
    draft = Draft(small, 2) if kind == "draft" else Ngram(2)
    cache = target.allocate(2, 64)
    sampled = Sampling(temperature=0.9, top_k=30, seed=4)
    for sampling in (Sampling(), sampled):
        generate(target, PROMPTS, 4, sampling, cache=cache, draft=draft)
    warm = counters["stats"]["unique_graphs"]
    assert warm >= 4
    lengths = set()
    for shift in range(3):
        prompts = [[token + shift for token in prompt] for prompt in PROMPTS]
        done = generate(target, prompts, NEW, cache=cache, draft=draft)
        assert done.speculation is not None
        lengths |= set(done.speculation.lengths)
        assert shift or done.completions == plain.completions
        generate(target, prompts, NEW, Sampling(temperature=1.2, top_k=30, seed=shift), cache=cache, draft=draft)
    assert len(lengths) > 2, "the rounds accepted different numbers"
    verdict = judge_speculation(target, untied, draft, PROMPTS, NEW, batch=2, cache_length=64)
    assert verdict.outcome.value == "AGREE"
    assert counters["stats"]["unique_graphs"] == warm, "something was compiled again after warm-up"

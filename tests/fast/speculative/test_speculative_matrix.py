"""Greedy equality at full size, judged by the oracle: `tox -e heavy`. The plain suite holds samples of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.compilers.compiled import Compiled
from llama_fast.compilers.eager import Eager
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.plan import Plan
from llama_fast.recipes import optimised
from llama_fast.speculative.proposers import Draft, Ngram, Padded, Proposer
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.models import resolve
from oracle.questions.cases import random_row, text_rows
from oracle.questions.judge import Bench
from oracle.questions.speculation import judge_speculation
from oracle.subjects.speculative import SpeculativeSubject
from oracle.verify import references

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(7200)]

TINY = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=101, max_context=256
)
PROMPTS = [random_row(101, 2 + i % 23, i) for i in range(50)]
NEW, SLOTS = 200, 240


@pytest.mark.parametrize("compiler", [Eager(), Compiled()], ids=["eager", "compiled"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_every_stream_agrees(compiler: Eager | Compiled, batch: int, k: int) -> None:
    """50 prompts x 200 tokens for each proposer; with aligned checks, equal bit for bit to plain decoding through them."""
    torch._dynamo.reset()
    checkpoint = random_checkpoint(TINY, 3)
    other = random_checkpoint(dataclasses.replace(TINY, n_layers=1), 8)
    target, int8, stranger = (
        build(source, Plan(kind, Static(length=SLOTS), compiler, fuse_projections=True), "cpu")
        for source, kind in ((checkpoint, Dense()), (checkpoint, Int8()), (other, Dense()))
    )
    bench = Bench(*references(target, checkpoint))
    drafts: dict[str, Callable[[bool], Proposer]] = {
        "int8": lambda aligned: Draft(int8, k, aligned=aligned),
        "other": lambda aligned: Draft(stranger, k, aligned=aligned),
        "ngram": lambda aligned: Ngram(k, aligned=aligned),
    }
    wanted = SpeculativeSubject(target, Padded(k), batch, SLOTS).greedy(PROMPTS, NEW)
    for name, draft in drafts.items():
        subject = SpeculativeSubject(target, draft(False), batch, SLOTS)
        verdict = bench.greedy(subject, PROMPTS, NEW)
        counted = [done.speculation for done in subject.generations if done.speculation]
        total = sum(counted[1:], counted[0])
        found = SpeculativeSubject(target, draft(True), batch, SLOTS).greedy(PROMPTS, NEW)
        same = sum(tokens == [*plain] for (tokens, _), (plain, _) in zip(found, wanted, strict=True))
        bits = sum(torch.equal(a, b) for (_, a), (_, b) in zip(found, wanted, strict=True))
        print(
            f"{name} k={k} batch={batch} {type(compiler).__name__}: {verdict.outcome.value}, streams equal {same}/50, "
            f"logits equal bit for bit {bits}/50, acceptance {total.acceptance:.3f}",
            flush=True,
        )
        assert verdict.outcome.value == "AGREE", verdict
        assert same == bits == 50


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_the_default_model_agrees(k: int, dtype: torch.dtype) -> None:
    """12 prompts x 64 tokens; in float32 the streams are those of plain decoding through aligned checks."""
    found = resolve("smollm2-135m")
    checkpoint = found.open("cpu", dtype)
    target = build(checkpoint, optimised(Dense()), "cpu", dtype)
    prompts = text_rows(found.tokenizer().encode, [9 + 3 * i for i in range(12)])
    for draft in (Draft(build(checkpoint, optimised(Int8()), "cpu", dtype), k), Ngram(k)):
        verdict = judge_speculation(target, checkpoint, draft, prompts, 64, batch=4, cache_length=256)
        print(f"{type(draft).__name__} k={k} {dtype}: {verdict.outcome.value}", flush=True)
        assert verdict.outcome.value == "AGREE", verdict
        if dtype is torch.float32:
            aligned = Ngram(k, aligned=True) if isinstance(draft, Ngram) else Draft(draft.runner, k, aligned=True)
            streams = [SpeculativeSubject(target, d, 4, 256).greedy(prompts, 64) for d in (aligned, Padded(k))]
            for (tokens, logits), (same, bits) in zip(*streams, strict=True):
                assert tokens == same and torch.equal(logits, bits)

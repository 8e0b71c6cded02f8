"""Keys and values in eight bits: what is kept, that rows answer as they do alone, and what it costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama_fast.build import build, rebuild
from llama_fast.caches.eight_bits import in_steps
from llama_fast.caches.paged import Paged
from llama_fast.caches.static import Static
from llama_fast.compilers.compiled import Compiled
from llama_fast.engine.engine import Engine
from llama_fast.engine.generate import generate
from llama_fast.engine.request import Event, Request
from llama_fast.engine.sampling import Sampling
from llama_fast.plan import Plan
from llama_fast.recipes import fused, optimised
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.statistics.drift import Tally, measure
from oracle.subjects.fast import FastSubject

CONFIG = LlamaConfig(
    dim=48, n_layers=3, n_heads=6, n_kv_heads=3, head_dim=8, ffn_dim=80, vocab_size=101, max_context=128
)
KINDS = {"slots": Static(bits=8), "pages": Paged(page=4, bits=8)}


def test_a_vector_is_near_integers_of_its_step() -> None:
    x = (
        torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e5, 1, 1e-5, 0, 3])[:, None, None]
    )
    whole, step = in_steps(x)
    assert whole.dtype == torch.int8 and step.shape == (5, 3, 1) and step.isfinite().all() and (step > 0).all()
    assert ((whole * step - x).abs() <= 0.5001 * step).all() and whole.abs().amax(-1)[[0, 1, 2, 4]].eq(127).all()


@pytest.mark.parametrize("name", KINDS)
def test_what_is_put_is_read_at_its_positions_and_others_stay(name: str) -> None:
    cache = KINDS[name].allocate(CONFIG, 2, 20, torch.bfloat16, torch.device("cpu"))
    k, v = torch.randn(2, 2, 3, 4, 8, generator=torch.Generator().manual_seed(1))
    layer = cache.layers[1]
    layer.put(k.bfloat16().transpose(1, 2), v.bfloat16().transpose(1, 2), torch.tensor([[2, 3, 4, 5], [7, 8, 9, 10]]))
    for row, first in ((0, 2), (1, 7)):
        for kept, new in ((layer.k, k), (layer.v, v)):
            (whole, step), there = in_steps(new[row].bfloat16()), kept[row, :, first : first + 4]
            assert kept.dtype == torch.bfloat16 and torch.equal(there, (whole * step).bfloat16())
            assert not kept[row, :, :first].any() and not kept[row, :, first + 4 :].any()
    assert not cache.layers[0].k.any()
    assert cache.nbytes < 0.6 * dataclasses.replace(KINDS[name], bits=None).allocate(
        dataclasses.replace(CONFIG, head_dim=64), 2, 20, torch.bfloat16, torch.device("cpu")
    ).nbytes * 8 / 64 * 2  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_join_answer_as_they_do_alone(name: str) -> None:
    checkpoint = random_checkpoint(CONFIG, 3, "cpu", torch.float32)
    runner = build(checkpoint, Plan(cache=KINDS[name], fuse_projections=True), "cpu", torch.float32)
    begin = [(7 * i * i + 3 * i) % 101 for i in range(9)]
    requests = [Request([*begin, n][n:], 12, Sampling(0.9, seed=n) if n % 2 else Sampling()) for n in range(4)]
    alone = [generate(runner, [one.ids], 12, one.sampling).completions[0].tokens for one in requests]
    engine, events = Engine(runner, 2, 40, chunk=4), list[Event]()
    ids = [engine.add(request) for request in requests]
    while engine.busy:
        events += engine.step()
    assert [[event.token for event in events if event.id == id] for id in ids] == alone


def test_pages_in_eight_bits_are_shared_and_say_what_slots_say() -> None:
    checkpoint = random_checkpoint(CONFIG, 3, "cpu", torch.float32)
    slots = build(checkpoint, Plan(cache=KINDS["slots"]), "cpu", torch.float32)
    pages = rebuild(slots, dataclasses.replace(slots.plan, cache=Paged(tokens=48, page=4, bits=8)))
    begin = [(7 * i * i + 3 * i) % 101 for i in range(17)]
    engine, events = Engine(pages, 3, 40), list[Event]()
    for _ in range(2):
        ids = [engine.add(Request([*begin, n], 14)) for n in range(3)]
        while engine.busy:
            events += engine.step()
        for n, id in enumerate(ids):
            alone = generate(slots, [[*begin, n]], 14).completions[0].tokens
            assert [event.token for event in events if event.id == id] == alone
    assert engine.pre_emptions and engine.reused_tokens


def test_a_compiled_step_reads_the_same_integers() -> None:
    checkpoint = random_checkpoint(CONFIG, 3, "cpu", torch.float32)
    eager = build(checkpoint, Plan(cache=Static(bits=8)), "cpu", torch.float32)
    compiled = rebuild(eager, dataclasses.replace(eager.plan, compiler=Compiled()))
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    found = [generate(runner, prompts, 8).completions for runner in (eager, compiled)]
    assert [one.tokens for one in found[0]] == [one.tokens for one in found[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_small(dtype: torch.dtype) -> None:
    checkpoint = random_checkpoint(CONFIG, 5, "cpu", torch.float32)
    rows = [[(7 * i * i + 3 * i + row) % 101 for i in range(90 - 30 * row)] for row in range(2)]
    exact, narrow = (
        FastSubject(build(checkpoint, Plan(cache=cache), "cpu", dtype)) for cache in (Static(), Static(bits=8))
    )
    true, ours = (subject.decode_logits(rows, [20, 11]) for subject in (exact, narrow))
    told = measure(Tally.of(ours, true, [row[split - 1 :] for row, split in zip(rows, (20, 11), strict=True)]))
    assert 0 < told.kld_mean.value < 1e-3 and told.top1_agreement.value > 0.95


def test_other_numbers_of_bits_are_refused_and_a_plan_tells_its_own() -> None:
    for kind in (Static, Paged):
        for bits in (4, True, "8", 0):
            with pytest.raises(ValueError, match=r"bits=.* must be 8, or None for the type of the arithmetic"):
                kind(bits=bits)
    assert "static in 8 bits" in str(Plan(cache=Static(bits=8))) and "paged in 8 bits" in str(fused_pages())


def fused_pages() -> Plan:
    return dataclasses.replace(fused(), cache=Paged(bits=8))


def test_a_conversation_of_eight_bits_is_kept() -> None:
    runner = build(random_checkpoint(CONFIG, 3, "cpu"), dataclasses.replace(optimised(), cache=Static(bits=8)), "cpu")
    cache = runner.allocate(2, 40)
    first, second = (generate(runner, [[3, 1, 4], [1, 5]], 30, cache=cache).completions for _ in range(2))
    assert first == second

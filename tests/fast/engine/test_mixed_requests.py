"""Requests of all kinds at random times over few pages, against each alone: `tests/gpu/test_many_requests.py` made small."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama_fast.build import build, rebuild
from llama_fast.caches.paged import Paged
from llama_fast.caches.static import Static
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import BatchSampler, Sampling
from llama_fast.plan import Plan
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.questions.judge import Bench
from oracle.verify import references
from tests.fast.engine.mixed_requests import Alone, Size, judged, played, requests_at_random

CONFIG = LlamaConfig(48, 2, 6, 2, 10, 72, 101, 96)
CHECKPOINT = random_checkpoint(CONFIG, 3)
APART = build(CHECKPOINT, Plan(cache=Static(multiple=8), fuse_projections=True), "cpu")
SIZE = Size(requests=60, prompt=20, answer=16)
LENGTH = SIZE.prompt + SIZE.answer


def alone() -> Alone:
    return Alone(APART, LENGTH, Bench(*references(APART, CHECKPOINT)))


def crowded() -> Engine:
    """Four rows in pages for two, steps ahead of the host, prompts by chunks."""
    runner = rebuild(APART, dataclasses.replace(APART.plan, cache=Paged(tokens=72, page=4)))
    return Engine(runner, 4, LENGTH, chunk=6)


def test_each_row_is_answered_as_alone() -> None:
    engine, asked = crowded(), requests_at_random(SIZE, CONFIG.vocab_size, 1)
    engine.steps.readback.depth = 2  # type: ignore[attr-defined]
    found = played(engine, asked, 2)
    assert judged(alone(), asked, found) <= 1
    assert found.cancelled and engine.pre_emptions and engine.reused_tokens
    assert not engine.busy and engine.free == 4


def test_a_row_with_its_neighbours_settings_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows, asked = BatchSampler.set_rows, requests_at_random(SIZE, CONFIG.vocab_size, 1)

    def late(self: BatchSampler, first: int, settings: list[Sampling], *rest: object) -> None:
        set_rows(self, first, [dataclasses.replace(one, seed=5) for one in settings], *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(BatchSampler, "set_rows", late)
        found = played(crowded(), asked, 2)
    with pytest.raises(AssertionError):
        judged(alone(), asked, found)


def test_a_tie_is_one_where_rounding_decides() -> None:
    judge, chance = alone(), torch.Generator().manual_seed(1)
    ids = torch.randint(101, (9,), generator=chance).tolist()
    for sampling in (
        Sampling(),
        Sampling(repetition_penalty=1.3),
        Sampling(1.0, seed=4),
        Sampling(0.7, top_k=5, seed=2),
    ):
        request = Request(ids, 6, sampling)
        own = judge.answer(request)
        assert judge.ties(request, own, True) == 0
        assert judge.is_tie(request, own[:2], (own[2], own[2]))
        others = [token for token in range(101) if token != own[2]]
        assert not any(judge.is_tie(request, own[:2], (token, own[2])) for token in others)

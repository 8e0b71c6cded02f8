"""Keys and values in pages on a GPU: the same texts as in slots of their own, compiled, as graphs and by our kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama_fast.build import build, rebuild
from llama_fast.caches.paged import Paged
from llama_fast.compilers.compiled import Compiled
from llama_fast.compilers.eager import Eager
from llama_fast.compilers.graphed import Graphed, Recorded, Recordings
from llama_fast.engine.engine import Engine
from llama_fast.engine.generate import generate
from llama_fast.engine.request import Event, Request
from llama_fast.engine.sampling import Sampling
from llama_fast.plan import Plan
from llama_fast.recipes import fused, optimised
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
CONFIG = LlamaConfig(
    dim=256, n_layers=3, n_heads=8, n_kv_heads=2, head_dim=32, ffn_dim=512, vocab_size=1000, max_context=512
)
PLANS = {
    "eager": optimised(),
    "graphed": dataclasses.replace(optimised(), compiler=Graphed()),
    "compiled": dataclasses.replace(optimised(), compiler=Compiled()),
    "fused": fused(),
    "fused, no graphs": dataclasses.replace(fused(), compiler=Eager()),
}


@pytest.mark.parametrize("name", list(PLANS))
def test_rows_that_share_pages_and_make_way_answer_as_they_do_alone(name: str) -> None:
    """In float32, where equal logits are rare; five rows in a pool for two of them, steps ahead, by chunks."""
    plan: Plan = PLANS[name]
    checkpoint = random_checkpoint(CONFIG, 0, torch.device("cuda"), torch.float32)
    apart = build(checkpoint, plan, "cuda", torch.float32)
    paged = rebuild(apart, dataclasses.replace(plan, cache=Paged(tokens=320, page=16)))
    begin = [(7 * i * i + 3 * i) % 1000 for i in range(70)]
    requests = [Request([*begin, n], 60, Sampling(0.9, seed=n) if n % 2 else Sampling()) for n in range(4)]
    requests.append(Request(begin[::-1], 60))
    alone = [generate(apart, [one.ids], 60, one.sampling).completions[0].tokens for one in requests]
    engine, events = Engine(paged, 4, 200, chunk=32), list[Event]()
    for _ in range(2):
        ids = [engine.add(request) for request in requests]
        while engine.busy:
            events += engine.step()
        for id, tokens in zip(ids, alone, strict=True):
            assert [event.token for event in events if event.id == id] == tokens
    assert engine.pre_emptions > 0 and engine.reused_tokens > 0


def test_one_recording_reads_the_prompts_of_every_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that join one after another, with prompts padded to one width: the first pass is recorded, for all slots."""
    checkpoint = random_checkpoint(CONFIG, 0, torch.device("cuda"), torch.float32)
    apart = build(checkpoint, fused(), "cuda", torch.float32)
    runner = rebuild(apart, dataclasses.replace(fused(), cache=Paged(page=16)))
    shapes: list[tuple[int, ...]] = []
    record = Recordings.record

    def counted(self: Recordings, cache: object, inputs: tuple[torch.Tensor, ...]) -> Recorded:
        shapes.append(tuple(inputs[0].shape))
        return record(self, cache, inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(Recordings, "record", counted)
    engine, events = Engine(runner, 4, 100), list[Event]()
    requests = [Request([(13 * n + i) % 1000 for i in range(20 + n)], 30) for n in range(4)]
    ids = []
    for request in requests:
        ids.append(engine.add(request))
        for _ in range(3):
            events += engine.step()
    while engine.busy:
        events += engine.step()
    assert shapes.count((1, 32)) == 1 and shapes.count((4, 1)) == 1
    for id, request in zip(ids, requests, strict=True):
        alone = generate(apart, [request.ids], 30).completions[0].tokens
        assert [event.token for event in events if event.id == id] == alone

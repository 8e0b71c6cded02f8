"""Cutting a model into stages: neighbouring layers, all of them once, and no rank reads what it does not hold."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_fast.build import build
from llama_fast.caches.paged import Paged
from llama_fast.caches.static import Static
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.engine import Engine
from llama_fast.engine.generate import generate
from llama_fast.engine.in_flight import GroupedSteps
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import Sampling
from llama_fast.model.roofline import stored_bytes, weight_bytes_per_step
from llama_fast.parallel.alone import Whole
from llama_fast.parallel.stages import Stages
from llama_fast.parallel.tensor_parallel import TensorParallel
from llama_fast.plan import Plan
from llama_fast.processes import Answer
from llama_fast.weights import encoded
from llama_ref.checkpoint import Checkpoint, random_checkpoint
from llama_ref.config import NAMED, LlamaConfig
from tests.fast.conftest import CONFIG
from tests.fast.parallel.test_tensor_parallel import CPU, Counted, Parts, divided, joined

DEEP = dataclasses.replace(CONFIG, n_layers=5)


def grid(stages: int, size: int) -> list[list[Stages]]:
    """The shards of every rank: [stage][tensor rank]."""
    return [
        [Stages(i, stages, Whole() if size == 1 else TensorParallel(t, size)) for t in range(size)]
        for i in range(stages)
    ]


@given(st.integers(1, 40), st.integers(1, 8), st.integers(10, 4000), st.integers(1, 60))
def test_stages_are_neighbouring_layers_that_read_about_as_much(layers: int, stages: int, vocab: int, ffn: int) -> None:
    config = dataclasses.replace(CONFIG, n_layers=max(layers, stages), vocab_size=vocab, ffn_dim=ffn)
    found = [Stages(i, stages).layers(config) for i in range(stages)]
    assert [layer for part in found for layer in part] == list(range(config.n_layers)) and all(map(len, found))
    head = vocab * 48 / (48 * (2 * 10 * (6 + 2) + 3 * ffn))
    read = [len(part) + (head if i == stages - 1 else 0) for i, part in enumerate(found)]
    if head < config.n_layers / stages - 1:
        assert max(read) <= (config.n_layers + head) / stages + 1


def test_a_head_counts_as_the_layers_that_it_reads_as_much_as() -> None:
    assert [len(Stages(i, 2).layers(NAMED["llama-3-8b"])) for i in range(2)] == [17, 15]
    assert [len(Stages(i, 2).layers(NAMED["llama-2-70b"])) for i in range(2)] == [40, 40]


@given(divided(), st.integers(1, 3), st.sampled_from([Dense(), Int8()]))
@settings(max_examples=40)
def test_the_shards_of_every_tensor_are_the_whole(case: tuple[LlamaConfig, int], stages: int, encoding: Any) -> None:
    config, size = case
    config = dataclasses.replace(config, n_layers=4)
    checkpoint = random_checkpoint(config, 3)

    def of(shard: Any) -> Parts:
        plan = Plan(encoding, shard=shard)
        return {stem: stored.tensors for stem, stored in encoded(checkpoint, plan, torch.float32, CPU)}

    whole, ranks = of(Whole()), [[of(shard) for shard in row] for row in grid(stages, size)]
    for stem, parts in whole.items():
        holders = [i for i, row in enumerate(ranks) if stem in row[0]]
        tied = stem == "tok_embeddings" and config.tie_embeddings and stages > 1
        assert holders == ([0, stages - 1] if tied else holders[:1]) and holders, stem
        for part, tensor in parts.items():
            again = joined(stem, part, ranks[holders[0]], config)
            assert again.dtype == tensor.dtype and torch.equal(again, tensor), (stem, part)
            if tied:
                assert torch.equal(torch.cat([rank[stem][part] for rank in ranks[-1]]), tensor), "the head, by its rows"


def test_a_rank_reads_what_it_holds_and_nothing_else(checkpoint: Checkpoint) -> None:
    checkpoint = random_checkpoint(dataclasses.replace(checkpoint.config, n_layers=5), 3, "cpu", torch.float32)
    read = []
    for shard in (shard for row in grid(2, 2) for shard in row):
        reads: list[int] = []
        watched = {name: Counted(source, reads) for name, source in checkpoint.weights.items()}
        parts = dict(encoded(dataclasses.replace(checkpoint, weights=watched), Plan(shard=shard), torch.float32, CPU))
        assert sum(reads) == sum(tensor.nbytes for stored in parts.values() for tensor in stored.tensors.values())
        read.append(sum(reads))
    whole = sum(4 * math.prod(source.shape) for source in checkpoint.weights.values())
    assert max(read) < 0.45 * whole


def test_a_stage_counts_its_own_bytes_and_keeps_its_own_layers(checkpoint: Checkpoint) -> None:
    checkpoint = random_checkpoint(dataclasses.replace(checkpoint.config, n_layers=5), 3, "cpu", torch.float32)
    whole = build(checkpoint, Plan(), "cpu")
    runners = [build(checkpoint, Plan(shard=Stages(i, 2)), "cpu") for i in range(2)]
    looked_up = (
        4 * 48 * (1 if checkpoint.config.tie_embeddings else 0)
    )  # then the first reads a row of what is no head there
    assert sum(weight_bytes_per_step(r.model) for r in runners) == weight_bytes_per_step(whole.model) + looked_up
    table = 4 * 101 * 48 if checkpoint.config.tie_embeddings else 0
    assert sum(stored_bytes(r.model) for r in runners) == stored_bytes(whole.model) + table
    assert [len(r.allocate(2, 8).layers) for r in runners] == [3, 2] and runners[1].model.first_layer == 3


def test_what_cannot_be_is_refused_with_the_numbers(untied: Checkpoint) -> None:
    with pytest.raises(ValueError, match="n_layers=2 are too few for 3 stages"):
        build(untied, Plan(shard=Stages(0, 3)), "cpu")
    with pytest.raises(ValueError, match="n_heads=6 does not divide over 4 ranks"):
        build(untied, Plan(shard=Stages(0, 2, TensorParallel(0, 4))), "cpu")
    with pytest.raises(ValueError, match="index=2 is none of 2 stages"):
        Stages(2, 2)
    alone = build(untied, Plan(shard=Stages(0, 2)), "cpu")
    with pytest.raises(ValueError, match="2 stages: a stage runs with the others"):
        alone.score(torch.tensor([[1, 2]]))
    assert str(Plan(shard=Stages(0, 2, TensorParallel(0, 4)))) == (
        "dense · growing · eager · tensor parallel over 4 in 2 stages"
    )


class Threads:
    """A line of stages that are threads of this process, and what happened in which order."""

    def __init__(self, index: int, count: int, queues: list[queue.Queue[Any]], log: list[tuple[str, int]]):
        self.index, self.count, self.queues, self.log = index, count, queues, log
        self.first, self.last = index == 0, index == count - 1

    def take(self, empty_BTD: Tensor) -> Tensor:
        found: Tensor = self.queues[self.index].get(timeout=30)
        assert found.shape == empty_BTD.shape and found.dtype == empty_BTD.dtype
        return found

    def give(self, x_BTD: Tensor) -> None:
        self.log.append(("gives", self.index))
        self.queues[self.index + 1].put(x_BTD.clone())

    def tell(self, token_B: Tensor, logits: Tensor) -> Answer:
        if self.last:
            self.log.append(("tells", self.index))
            for other in range(self.count - 1):
                self.queues[self.count + other].put((token_B.clone(), logits.clone()))
            return lambda: (token_B, logits)

        def answer() -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = self.queues[self.count + self.index].get(timeout=30)
            assert [one.shape for one in found] == [token_B.shape, logits.shape]
            assert [one.dtype for one in found] == [token_B.dtype, logits.dtype]
            self.log.append(("hears", self.index))
            return found

        return answer


def staged(checkpoint: Checkpoint, plan: Plan, stages: int, ask: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
    """What `ask` of each stage's runner returns, all at once, and the log."""
    log: list[tuple[str, int]] = []
    queues: list[queue.Queue[Any]] = [queue.Queue() for _ in range(2 * stages)]
    runners = [
        build(
            checkpoint, dataclasses.replace(plan, shard=Stages(i, stages, line=Threads(i, stages, queues, log))), "cpu"
        )
        for i in range(stages)
    ]
    together = threading.Barrier(stages, timeout=30)

    def on(runner: Any) -> Any:
        together.wait()
        return ask(runner)

    with ThreadPoolExecutor(stages) as pool:
        return list(pool.map(on, runners)), log


@pytest.mark.parametrize("cache", [Static(), Paged(page=4)], ids=["static", "paged"])
@pytest.mark.parametrize("stages", [2, 3])
def test_rows_that_join_and_leave_are_answered_as_by_one_process(stages: int, cache: Any) -> None:
    checkpoint = random_checkpoint(DEEP, 3, "cpu", torch.float32)
    requests = [
        Request([5, 9, 17, 3], 9),
        Request([4], 3, Sampling(0.8, seed=4)),
        Request([8, 2, 6, 1, 44, 7, 23], 6, Sampling(frequency_penalty=0.7, presence_penalty=0.2)),
        Request([50, 51], 1),
        Request([5, 9, 17, 3, 80], 12, Sampling(repetition_penalty=1.3), logprobs=2),
        Request([30, 31, 32], 7, Sampling(1.1, top_k=7, seed=9)),
    ]

    def ask(runner: Any) -> Any:
        engine = Engine(runner, 3, 32, chunk=3)
        told: dict[int, list[Any]] = {}
        for request in requests[:4]:
            engine.add(request)
        for count in range(200):
            if count == 4:
                engine.add(requests[4])
            if count == 6:
                engine.add(requests[5])
            for event in engine.step():
                told.setdefault(event.id, []).append((event.token, event.logprob and event.logprob.logprob))
        assert not engine.busy
        return [[token for token, _ in told[i]] for i in range(6)], [round(p, 4) for _, p in told[4]]

    alone = ask(build(checkpoint, Plan(cache=cache), "cpu"))
    found, _ = staged(checkpoint, Plan(cache=cache), stages, ask)
    assert [len(row) for row in alone[0]] == [9, 3, 6, 1, 12, 7]
    assert found == [alone] * stages


def test_a_token_on_its_way_to_a_row_that_leaves_is_not_noted_for_who_joins_in_its_slot() -> None:
    """Both say the same, and what is said once is hardly said again."""
    checkpoint, penalty = random_checkpoint(DEEP, 3, "cpu", torch.float32), Sampling(repetition_penalty=50.0)
    asked = [Request([5, 9, 17], 2, penalty), Request([4, 2], 12), Request([5, 9, 17], 8, penalty)]

    def ask(runner: Any) -> Any:
        engine = Engine(runner, 2, 32)
        said: dict[int, list[int]] = {engine.add(request): [] for request in asked}
        while engine.busy:
            for event in engine.step():
                said[event.id].append(event.token)
        return said

    alone = ask(build(checkpoint, Plan(), "cpu"))
    assert alone[0] == alone[2][:2] and len(set(alone[2])) == 8
    assert staged(checkpoint, Plan(), 2, ask)[0] == [alone] * 2


def test_stages_work_on_other_rows_while_an_answer_is_on_its_way() -> None:
    """The first stage gives what it has of the second group before it has heard of the first."""
    prompts = [[5, 9, 17], [4, 2], [8, 2, 6, 1], [50, 51, 52, 53, 54]]
    checkpoint = random_checkpoint(DEEP, 3, "cpu", torch.float32)
    alone = generate(build(checkpoint, Plan(), "cpu"), prompts, 8)

    def ask(runner: Any) -> Any:
        engine = Engine(runner, len(prompts), 16)
        assert isinstance(engine.steps, GroupedSteps) and engine.steps.groups == [slice(0, 2), slice(2, 4)]
        return [one.tokens for one in generate(runner, prompts, 8).completions]

    found, log = staged(checkpoint, Plan(cache=Static()), 2, ask)
    assert found == [[one.tokens for one in alone.completions]] * 2
    first = [what for what, stage in log if stage == 0]
    assert first.count("gives") == first.count("hears") == 1 + 2 * 7
    ahead = [first[: i + 1].count("gives") - first[: i + 1].count("hears") for i in range(len(first))]
    assert max(ahead) == 2, "as many passes under way as there are stages"
    assert ahead.count(2) == 2 * 7 - 1, "at every step but the first"

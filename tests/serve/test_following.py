"""Engines that follow another one step alike; here both are of one process, and a list stands between them."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from functools import partial
from typing import Any

import pytest

from llama_fast import Llama
from llama_fast.build import build
from llama_fast.caches.growing import Growing
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request, Row
from llama_fast.engine.sampling import Sampling
from llama_fast.grammars.asked import JsonSchema, Regex
from llama_fast.plan import Plan
from llama_fast.serve.following import LeadingEngine, Letters, follow
from llama_fast.serve.scoring import prompt_logprobs
from llama_fast.serve.spelling import EndingWriter
from llama_ref.checkpoint import random_checkpoint

ROWS, LENGTH = 3, 96
GRAMMARS = (JsonSchema({"type": "object", "properties": {"a": {"type": "integer"}}}), Regex("(a|the)+"))


class Wire:
    """What was sent and is not yet received."""

    def __init__(self) -> None:
        self.letters: deque[bytes] = deque()
        self.send, self.receive = self.letters.append, self.letters.popleft


class Watched(Engine):
    """An engine that remembers who stood in its slots at each step."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.seen: list[Any] = []

    def step(self) -> Any:
        self.seen.append([named(row) for row in self.slots])
        return super().step()


def named(row: Row | None) -> object:
    return None if row is None else (row.id, *row.tokens)


def lead(llama: Llama, seed: int) -> tuple[Wire, list[Any], int]:
    """Requests come to a leading engine and are cancelled at random; what was sent, its slots, and how many ended early."""
    chance, wire, seen = random.Random(seed), Wire(), []
    engine = LeadingEngine(wire, llama, ROWS, LENGTH)
    running: list[int] = []
    stopped = 0
    for turn in range(120):
        if turn < 100 and chance.random() < 0.3:
            ids = llama.encode(chance.choice(["the cat sat", "é€ and", "dogs", "a mat and saw dogs run"]))
            writer: Any = llama.writer(ids, chance.choice([(), ("a", "on"), ("sat",)]))
            if chance.random() < 0.3:
                writer = EndingWriter(writer, [5])
            grammar = llama.constraint(chance.choice(GRAMMARS)) if chance.random() < 0.3 else None
            sampling = Sampling(chance.choice([0.0, 0.9]), grammar=grammar, seed=chance.randrange(99))
            running.append(engine.add(Request(ids, chance.randint(1, 30), sampling, () if grammar else (1,)), writer))
        if running and chance.random() < 0.1:
            engine.cancel(chance.choice(running))
        if chance.random() < 0.05:
            engine.everywhere(partial(prompt_logprobs, llama.runner, [1, 2, 3], 2))()
        seen.append([named(row) for row in engine.slots])
        stopped += sum(event.finish_reason == "stop" for event in engine.step())
    engine.close()
    return wire, seen, stopped


@pytest.mark.parametrize("seed", range(3))
def test_a_following_engine_has_the_same_rows_in_the_same_slots_at_every_step(llama: Llama, seed: int) -> None:
    """Ends by stop strings and stop ids included, and by grammars: the writers travel, and what was asked."""
    wire, seen, stopped = lead(llama, seed)
    engine = Watched(llama.runner, ROWS, LENGTH)
    follow(engine, wire, llama)
    assert engine.seen == seen and stopped > 3
    assert any(None not in slots for slots in seen) and not engine.busy and not wire.letters


def test_a_rank_that_chooses_otherwise_is_noticed(llama: Llama) -> None:
    wire, _, _ = lead(llama, 1)
    other = build(random_checkpoint(llama.runner.checkpoint.config, 4), Plan(cache=Growing()), "cpu")
    with pytest.raises(RuntimeError, match="the ranks differ"):
        follow(Engine(other, ROWS, LENGTH), wire, Llama(other, llama.tokenizer))


@pytest.mark.parametrize(("fails", "noticed"), [([True, True], False), ([True, False], True), ([False, True], True)])
def test_a_job_that_fails_on_one_rank_alone_is_noticed(llama: Llama, fails: list[bool], noticed: bool) -> None:
    """One that fails on all ranks is the first one's to tell."""
    NEXT[:] = fails
    wire = Wire()
    engine = LeadingEngine(wire, llama, ROWS, LENGTH)
    with pytest.raises(ZeroDivisionError) if fails[0] else contextlib.nullcontext():
        engine.everywhere(work)()
    engine.add(Request([1, 2], 2))
    engine.step()
    engine.close()
    with pytest.raises(RuntimeError, match="the ranks differ") if noticed else contextlib.nullcontext():
        follow(Engine(llama.runner, ROWS, LENGTH), wire, llama)


NEXT: list[bool] = []


def work() -> None:
    if NEXT.pop(0):
        raise ZeroDivisionError


def test_a_request_that_cannot_travel_is_refused_and_leaves_no_gap(llama: Llama) -> None:
    wire = Wire()
    engine = LeadingEngine(wire, llama, ROWS, LENGTH)
    unknown: Any = lambda: None  # noqa: E731 - what pickle cannot name
    with pytest.raises(ValueError, match="the other ranks cannot be told of this request"):
        engine.add(Request([1, 2], 2), unknown)
    assert not engine.busy and engine.add(Request([1, 2], 2)) == 0
    while engine.busy:
        engine.step()
    engine.close()
    follow(Engine(llama.runner, ROWS, LENGTH), wire, llama)


def test_parts_of_the_model_travel_by_name(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that it makes when they are first asked for, and that pickle could not copy."""
    monkeypatch.setattr(llama, "lock", threading.Lock(), raising=False)
    letters = Letters(llama)
    sent = (llama, llama.runner, llama.tokenizer, vars(llama)["lock"], llama.tokenizer.decode, None)
    letter = letters.written(sent)
    assert all(one is other for one, other in zip(letters.read(letter)[:4], sent))
    assert letters.read(letter)[4:] == sent[4:] and len(letter) < 300
    with pytest.raises(TypeError, match="lock"):
        letters.written(threading.Lock())

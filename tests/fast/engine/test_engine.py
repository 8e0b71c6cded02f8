"""Requests that come and go: each is answered as it would be alone, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast.build import build
from llama_fast.caches.growing import Growing
from llama_fast.caches.paged import Paged, PagedCache
from llama_fast.caches.static import Static
from llama_fast.compilers.compiled import Compiled
from llama_fast.contracts import KVCache
from llama_fast.engine import steps
from llama_fast.engine.engine import Engine
from llama_fast.engine.generate import generate
from llama_fast.engine.request import Event, Request, Row
from llama_fast.engine.room import OwnSlots, SharedPages, common
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import BatchSampler, Sampling
from llama_fast.engine.speculation import Speculation
from llama_fast.engine.transfer import Readback
from llama_fast.plan import Plan
from llama_fast.speculative.proposers import Draft, DraftSource, Ngram, Proposer
from llama_fast.speculative.rounds import Rounds
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.questions.judge import Bench
from oracle.statistics.compare import Outcome
from oracle.statistics.greedy import Continuation, compare_greedy
from oracle.verify import references

CONFIG = LlamaConfig(48, 2, 6, 2, 10, 72, 101, 64)
CHECKPOINT = random_checkpoint(CONFIG, 3)
LENGTH = 40
PLANS = {
    "static": Plan(cache=Static(multiple=8), fuse_projections=True),
    "growing": Plan(cache=Growing()),
    "paged": Plan(cache=Paged(page=4), fuse_projections=True),
    "paged, short of pages": Plan(cache=Paged(tokens=40, page=4), fuse_projections=True),
}
RUNNERS = {name: build(CHECKPOINT, plan, "cpu") for name, plan in PLANS.items()}
ALONE: dict[tuple[str, Any, Sampling, Speculation | None], list[int]] = {}
"""The longest answer to a prompt alone, by the plan's name, and of a row that draws by who proposes."""


def alone(name: str, request: Request, draft: Speculation | None = None) -> list[int]:
    """What a request is answered alone: the longest answer, cut where this one ends."""
    draft = draft if request.sampling.temperature else None
    known = (name, request.ids, request.sampling, draft)
    if len(ALONE.setdefault(known, [])) < request.max_new_tokens:
        longest = max(12, request.max_new_tokens)
        done = generate(RUNNERS[name], [request.ids], longest, request.sampling, draft=draft)
        ALONE[known] = done.completions[0].tokens
    tokens = ALONE[known][: request.max_new_tokens]
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in request.eos_ids), len(tokens))]


SAMPLINGS = (
    Sampling(),
    Sampling(seed=4),
    Sampling(0.9, seed=1),
    Sampling(1.1, top_k=7, seed=2),
    Sampling(1.0, top_p=0.8, seed=2**40 + 3),
    Sampling(1.3, top_k=40, min_p=0.05, seed=4),
    Sampling(repetition_penalty=1.3),
    Sampling(0.8, repetition_penalty=1.2, seed=5),
)
PROMPTS = ((5, 17, 3), (88,), (4, 4, 4, 61, 20, 9, 33), (1, 2), (70, 6, 5, 4, 3, 2, 1, 90, 91, 92, 93, 94))
requests = st.builds(
    Request,
    st.sampled_from(PROMPTS),
    st.integers(1, 12),
    st.sampled_from(SAMPLINGS),
    st.sampled_from(((), tuple(range(0, 101, 5)))),  # one token in five ends a text
)
Action = tuple[str, Any]
actions: st.SearchStrategy[Action] = st.one_of(
    st.tuples(st.just("add"), requests),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 5)),
)


class Played:
    """What came of a list of actions."""

    def __init__(self, engine: Engine, actions: Sequence[Action], bare: Callable[[Engine], None] = lambda engine: None):
        self.requests: dict[int, Request] = {}
        self.events: dict[int, list[Event]] = {}
        self.cancelled: set[int] = set()
        for kind, value in [*actions, ("step", 10**6)]:
            if kind == "add":
                id = engine.add(value)
                self.requests[id], self.events[id] = value, []
            elif kind == "cancel" and value in self.requests:
                running = engine.answers(value)
                assert engine.cancel(value) is running
                if running:
                    self.cancelled.add(value)
            elif kind == "step":
                for _ in range(value):
                    if not engine.busy:
                        break
                    for event in engine.step():
                        assert event.id not in self.cancelled, "nothing is told of a row that nobody wants"
                        self.events[event.id].append(event)
                    bare(engine)


def pages_are_whole(engine: Engine) -> None:
    """Every page is free, kept, or held by as many rows as hold it; the table says so, and what is known is known of one page."""
    room = engine.room
    if isinstance(room, OwnSlots):
        return
    assert isinstance(room, SharedPages) and isinstance(engine.cache, PagedCache)
    pages, held = room.pages, Counter(page for of_slot in room.of_slots for page in of_slot)
    assert [held[page] for page in range(pages.count + 1)] == pages.holders
    assert sorted([*pages._free, *pages._kept, *held]) == list(range(1, pages.count + 1))
    assert {page: content for content, (page, _) in pages._known.items()} == pages._content
    assert not set(pages._free) & set(pages._content) and set(pages._kept) <= set(pages._content)
    for slot, (row, of_slot) in enumerate(zip(engine.slots, room.of_slots, strict=True)):
        assert bool(of_slot) == (row is not None)
        table = engine.cache.table.pages_BP[slot].tolist()
        assert table == of_slot + [0] * (len(table) - len(of_slot))


def nothing_is_left(engine: Engine) -> None:
    assert not engine.busy and engine.free == len(engine.slots) and engine.step() == []
    assert not engine._rows and not engine._queue and engine._reading is None
    pages_are_whole(engine)
    if isinstance(engine.room, OwnSlots):
        assert engine.room.before == [None] * len(engine.slots)
    else:
        assert isinstance(engine.room, SharedPages) and engine.room.pages.available == engine.room.pages.count
    if isinstance(engine.steps, Rounds):
        rounds = engine.steps
        assert not rounds.launched and not rounds.joined and rounds.sampler.settings == [None] * len(engine.slots)
        assert not isinstance(rounds.source, DraftSource) or rounds.source.taken is None
    else:
        plain = engine.steps
        assert isinstance(plain, steps.PlainSteps)
        assert not plain.under_way and plain.choose.settings == [None] * len(engine.slots)


def judged(name: str, request: Request, tokens: list[int], draft: Speculation | None = None) -> bool:
    """Whether these tokens are the row's own; a greedy one that differs must be a tie by the oracle's rule."""
    known = alone(name, request, draft)
    if tokens == known:
        return True
    at = common(tokens, known)
    assert request.sampling.temperature == 0 and request.sampling.repetition_penalty == 1, (request, at)
    bench = Bench(*references(RUNNERS[name], CHECKPOINT))
    truth, yardstick = bench.of([[*request.ids, *tokens]])
    part = slice(len(request.ids) - 1, len(request.ids) - 1 + len(tokens))
    run = Continuation(tokens, None, truth[0][part], yardstick[0][..., part, :])
    assert compare_greedy([run], torch.finfo(torch.float32).eps).outcome is Outcome.AGREE, (request, at)
    return False


def check_answers(name: str, played: Played, draft: Speculation | None = None) -> int:
    """Every row's tokens are those it gives alone, up to where it was cancelled. Returns how many ties there were."""
    ties = 0
    for id, request in played.requests.items():
        tokens, reasons = [event.token for event in played.events[id]], [e.finish_reason for e in played.events[id]]
        if id in played.cancelled:
            known = alone(name, request, draft)
            assert len(tokens) < len(known) or tokens != known
            same = tokens == known[: len(tokens)]
            assert same or request.sampling.temperature == 0
        else:
            ties += not judged(name, request, tokens, draft)
            assert reasons[:-1] == [None] * (len(tokens) - 1)
            assert reasons[-1] == ("stop" if tokens[-1] in request.eos_ids else "length")
    return ties


@pytest.mark.parametrize("name", list(PLANS))
@settings(max_examples=25)
@given(
    st.lists(actions, min_size=3, max_size=25),
    st.integers(1, 3),
    st.sampled_from([0, 2]),
    st.sampled_from([None, 3]),
)
def test_rows_that_come_and_go_answer_as_they_do_alone(
    name: str, actions: list[Action], rows: int, ahead: int, chunk: int | None
) -> None:
    """`ahead`: steps that are launched before the oldest is read, as on a GPU."""
    engine = Engine(RUNNERS[name], rows, LENGTH, chunk=chunk)
    plain = engine.steps
    assert isinstance(plain, steps.PlainSteps)
    plain.readback.depth = ahead
    assert check_answers(name, Played(engine, actions, pages_are_whole)) <= 1, "ties are as rare as equal logits"
    nothing_is_left(engine)


OTHER = build(random_checkpoint(dataclasses.replace(CONFIG, n_layers=1), 8), Plan(), "cpu")
DRAFTS: dict[str, Proposer] = {
    "a lookup": Ngram(3, shortest=1),
    "a lookup, aligned": Ngram(2, shortest=1, aligned=True),
    "itself": Draft(RUNNERS["static"], 2),
    "another model": Draft(OTHER, 3),
}


def depth_of(ahead: int) -> Callable[[Readback, torch.device], None]:
    """A readback that lets so many steps be launched before the oldest is read, as on a GPU."""
    begin = Readback.__init__

    def deep(self: Readback, device: torch.device) -> None:
        begin(self, device)
        self.depth = ahead

    return deep


@pytest.mark.parametrize("name", list(DRAFTS))
@settings(max_examples=25)
@given(
    st.sampled_from(list(PLANS)),
    st.lists(actions, min_size=3, max_size=25),
    st.integers(1, 5),
    st.sampled_from([0, 2]),
    st.sampled_from([None, 3]),
)
def test_rows_that_come_and_go_between_rounds_answer_as_they_do_alone(
    name: str, plan: str, actions: list[Action], rows: int, ahead: int, chunk: int | None
) -> None:
    """With a draft: greedy rows as without one, rows that draw as alone with it. The model itself is always right."""
    draft = DRAFTS[name]
    wanted = [(kind, of) for kind, of in actions if kind != "add" or may_speculate(of, draft)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Readback, "__init__", depth_of(ahead))
        engine = Engine(RUNNERS[plan], rows, LENGTH, draft=draft, chunk=chunk)
        played = Played(engine, wanted, pages_are_whole)
    assert check_answers(plan, played, draft) <= 1, "ties are as rare as equal logits"
    nothing_is_left(engine)
    counted = engine.statistics
    assert counted is not None and (name != "itself" or counted.tried - counted.accepted <= 1)


def may_speculate(request: Request, draft: Proposer) -> bool:
    """Whether a request can be answered with a draft."""
    return request.sampling.repetition_penalty == 1 and not (draft.aligned and request.sampling.temperature)


@settings(max_examples=25)
@given(
    st.sampled_from([Ngram(shortest=1), Draft(RUNNERS["static"])]),
    st.lists(actions, min_size=3, max_size=25),
    st.lists(st.integers(0, 4), min_size=1, max_size=8),
    st.sampled_from([0, 2]),
)
def test_rows_that_come_and_go_answer_alike_whatever_number_is_proposed(
    draft: Proposer, actions: list[Action], ks: list[int], ahead: int
) -> None:
    """Rounds of any length, and plain steps between them: a draft is then behind, and reads what it missed."""
    greedy = [(kind, dataclasses.replace(of, sampling=Sampling()) if kind == "add" else of) for kind, of in actions]
    turns = itertools.cycle(ks)

    def any_k(rounds: Rounds) -> int:
        k = next(turns)
        k = k if k < max(rounds.left) else 0
        rounds.joined &= k > 0 or rounds.source.keeps_up
        return k

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Readback, "__init__", depth_of(ahead))
        patch.setattr(Rounds, "next_k", any_k)
        engine = Engine(RUNNERS["paged"], 3, LENGTH, draft=draft)
        played = Played(engine, greedy, pages_are_whole)
    assert check_answers("paged", played) <= 1
    nothing_is_left(engine)
    counted = engine.statistics
    assert counted is not None and (isinstance(draft, Ngram) or counted.tried - counted.accepted <= 1)


def test_what_is_under_way_for_a_row_that_left_is_not_for_the_next_one_in_its_slot() -> None:
    """A round is launched ahead, its row is cancelled, and another stands in the slot when it comes back."""
    draft = Draft(RUNNERS["growing"], 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Readback, "__init__", depth_of(2))
        engine = Engine(RUNNERS["static"], 2, LENGTH, draft=draft)
        actions = [("add", Request(prompt, 20)) for prompt in PROMPTS[:2]] + [("step", 3)]
        late = [("cancel", 0), ("add", Request(PROMPTS[2], 20)), ("step", 1), ("cancel", 1)]
        rounds = engine.steps
        assert isinstance(rounds, Rounds)
        under_way: list[int] = []
        played = Played(engine, [*actions, *late], lambda engine: under_way.append(len(rounds.launched)))
    assert under_way[2] > 0 and check_answers("static", played) == 0


def test_rounds_beside_a_prompt_that_is_read_in_part_have_room_behind_it() -> None:
    """The longest request that the context holds is read by chunks while others speculate as far as they have room."""
    longest = Request([(7 * i) % 101 for i in range(60)], 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Rounds, "next_k", lambda rounds: max((k for k in rounds.terms.ks if k < max(rounds.left)), default=0)
        )
        engine = Engine(RUNNERS["static"], 3, CONFIG.max_context, draft=Ngram(shortest=1), chunk=29)
        first = [("add", Request(PROMPTS[n], new)) for n, new in ((2, 40), (0, 2), (1, 40))]
        actions = [*first, ("step", 4), ("add", longest)]  # in the slot between two others
        played = Played(engine, actions)
    for id, request in played.requests.items():
        own = generate(RUNNERS["static"], [request.ids], request.max_new_tokens).completions[0].tokens
        assert [event.token for event in played.events[id]] == own
    counted = engine.statistics
    assert counted is not None and counted.rounds > 0 and counted.plain_steps > 0
    nothing_is_left(engine)


def test_who_comes_late_is_answered_beside_the_others() -> None:
    """Its first token is there long before theirs have ended, and few rows in many slots are a round of few."""
    engine = Engine(RUNNERS["static"], 8, LENGTH, draft=Draft(RUNNERS["growing"], 2))
    assert isinstance(engine.steps, Rounds)
    engine.add(Request(PROMPTS[0], 30))
    said: dict[int, int] = Counter()
    sizes = []
    while engine.busy:
        for event in engine.step():
            said[event.id] += 1
            assert event.id != 0 or event.finish_reason is None or said[3] == 4, "the first one ends last"
        sizes.append(len(engine.steps.state.position_B))
        if len(sizes) == 2:
            for prompt in PROMPTS[1:4]:
                engine.add(Request(prompt, 4))
    assert said == {0: 30, 1: 4, 2: 4, 3: 4}
    assert sizes[0] == 1 and max(sizes) == 4


MIXED = [
    ("add", Request(PROMPTS[0], 9, SAMPLINGS[0])),
    ("add", Request(PROMPTS[2], 5, SAMPLINGS[4])),
    ("step", 3),
    ("add", Request(PROMPTS[4], 12, SAMPLINGS[5])),
    ("step", 2),
    ("cancel", 0),
    ("add", Request(PROMPTS[3], 7, SAMPLINGS[3])),
    ("add", Request(PROMPTS[1], 11, SAMPLINGS[7])),
    ("step", 4),
    ("add", Request(PROMPTS[0], 1, SAMPLINGS[2])),
]


def test_rows_of_compiled_steps_answer_as_they_do_alone() -> None:
    """Greedy ones and drawn ones side by side, in one shape; the code for any settings is compiled once."""
    runner = dataclasses.replace(build(CHECKPOINT, dataclasses.replace(PLANS["static"], compiler=Compiled()), "cpu"))
    RUNNERS["compiled"] = runner
    engine = Engine(runner, 2, LENGTH)
    codes = set()
    played = Played(engine, MIXED, lambda engine: codes.add(engine.steps.choose.code))  # type: ignore[attr-defined]
    for id, request in played.requests.items():
        tokens = [event.token for event in played.events[id]]
        known = alone("static", request)  # eager, and of one row: to compile for each would take minutes
        assert tokens == known[: len(tokens)] and (id in played.cancelled or len(tokens) == len(known))
    assert len(played.cancelled) == 1 and len(codes) <= 2
    nothing_is_left(engine)


def slots_of(cache: KVCache) -> list[torch.Tensor]:
    return [tensor.clone() for layer in cache.layers for tensor in (layer.k, layer.v)]


@pytest.mark.parametrize("name", ["static", "growing", "paged"])
def test_who_joins_leaves_its_neighbours_keys_as_they_are(name: str) -> None:
    engine = Engine(RUNNERS[name], 3, LENGTH)
    for prompt in PROMPTS[2:5]:
        engine.add(Request(prompt, 20))
    for _ in range(4):
        engine.step()
    engine.cancel(1)
    before = slots_of(engine.cache)
    engine.add(Request(PROMPTS[4], 20))
    engine.step()  # on a CPU: its prompt is read, and no step is launched
    for old, new in zip(before, slots_of(engine.cache), strict=True):
        kept = old.shape[2]
        for neighbour in (0, 2):
            assert torch.equal(old[neighbour], new[neighbour, :, :kept]), "a neighbour's keys"
        assert not torch.equal(old[1], new[1, :, :kept]), "its own"


@pytest.mark.parametrize("name", list(PLANS))
def test_some_rows_of_a_cache_are_the_caches_own(name: str) -> None:
    runner = RUNNERS[name]
    cache = runner.allocate(3, 16)
    tokens_BT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0], [1, 2, 0, 0]])
    runner.prefill(tokens_BT, torch.tensor([4, 3, 2]), cache)
    before, part = slots_of(cache), cache.rows(1, 2)
    assert part is cache.rows(1, 2) and part.batch == 2 and part.length == cache.length
    runner.prefill(tokens_BT[:2] + 20, torch.tensor([4, 3]), part)
    for old, new, own in zip(before, slots_of(cache), slots_of(part), strict=True):
        assert torch.equal(old[0], new[0]) and torch.equal(new[1:], own) and not torch.equal(old[1:], own)
    longer = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(1))
    runner.prefill(longer, torch.tensor([12, 9]), part)
    for old, new in zip(before, slots_of(cache), strict=True):
        assert torch.equal(old[0], new[0, :, : old.shape[2]]), "also where a growing cache grows"


@pytest.mark.parametrize("name", list(PLANS))
def test_a_free_slot_writes_to_its_own_row_alone_and_within_it(name: str) -> None:
    """A long text beside a slot whose row has ended, in a cache that ends with the text."""
    engine = Engine(RUNNERS[name], 2, LENGTH)
    engine.add(Request(PROMPTS[0], LENGTH - 3))
    engine.add(Request(PROMPTS[1], 2, eos_ids=()))
    tokens = [event.token for _ in range(60) for event in engine.step() if event.id == 0]
    assert tokens == alone(name, Request(PROMPTS[0], LENGTH - 3)) and len(tokens) == LENGTH - 3
    assert isinstance(engine.steps, steps.PlainSteps) and int(engine.steps.position_B[1]) == 0


def test_a_prompt_that_begins_as_its_slot_held_is_read_from_there_on() -> None:
    runner = RUNNERS["static"]
    engine = Engine(runner, 2, LENGTH, keeps_prefixes=True)
    for prompt in (PROMPTS[2], PROMPTS[4]):
        engine.add(Request(prompt, 6))
    said: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    while engine.busy:
        for event in engine.step():
            said[event.id].append(event.token)
    assert engine.kept(0) == [*PROMPTS[2], *said[0][:-1]] and engine.reused_tokens == 0
    longer = [*PROMPTS[2], *said[0], 44, 45], [*PROMPTS[4][:5], 77]
    for prompt in longer:
        engine.add(Request(prompt, 8, Sampling(0.7, seed=6)))
    while engine.busy:
        for event in engine.step():
            said[event.id].append(event.token)
    assert engine.reused_tokens == len(PROMPTS[2]) + 5 + 5
    for id, prompt in zip((2, 3), longer, strict=True):
        assert said[id] == alone("static", Request(prompt, 8, Sampling(0.7, seed=6)))


def test_requests_wait_their_turn_and_start_together_where_all_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    begin = Runner.begin_prompt
    monkeypatch.setattr(
        Runner, "begin_prompt", lambda self, ids, *rest: read.append(len(ids)) or begin(self, ids, *rest)
    )
    engine = Engine(RUNNERS["static"], 3, LENGTH)
    firsts = []
    for _ in range(5):
        engine.add(Request(PROMPTS[0], 4))
    assert engine.free == 3
    while engine.busy:
        firsts += [event.id for event in engine.step() if event.id not in firsts]
    assert firsts == [0, 1, 2, 3, 4] and read[0] == 3 and sum(read) == 5


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: Request([1] * 30, 11), "a prompt of 30 tokens and 11 new ones do not fit the 40 positions of a row"),
        (lambda: Request([1] * 60, 5), "exceed the model's context of 64"),
        (lambda: Request([101], 5), "token id 101 is outside the vocabulary of 101"),
        (lambda: Request([], 5), "a prompt is empty"),
        (lambda: Request([1], 0), "max_new_tokens=0"),
        (lambda: Request([1], 5, logprobs=-1), "logprobs=-1"),
        (lambda: Request([1], 5, Sampling(seed=(1, 2))), "2 seeds for 1 prompts"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_begins(request_: Callable[[], Request], message: str) -> None:
    engine = Engine(RUNNERS["static"], 2, LENGTH)
    with pytest.raises(ValueError, match=message):
        engine.add(request_())
    assert not engine.busy


@pytest.mark.parametrize(
    "draft", [Ngram(3), Draft(RUNNERS["growing"], 2), Ngram()], ids=["ngram", "draft", "automatic"]
)
def test_speculation_is_a_stepper_of_the_same_engine(draft: Any) -> None:
    """Requests of several lengths start together; those for which there is no slot start when others have ended."""
    engine = Engine(RUNNERS["static"], 3, LENGTH, draft=draft)
    greedy = [Request(prompt, new) for prompt, new in zip(PROMPTS, (12, 5, 9, 1, 7), strict=True)]
    played = Played(engine, [*(("add", request) for request in greedy), ("step", 2), ("cancel", 2)])
    for id, request in played.requests.items():
        tokens = [event.token for event in played.events[id]]
        assert tokens == alone("static", request)[: len(tokens)] and (id == 2 or len(tokens) == request.max_new_tokens)
    assert not engine.busy and engine.free == 3 and engine.statistics is not None


def test_a_greedy_row_beside_drawn_ones_is_greedy_under_speculation() -> None:
    engine = Engine(RUNNERS["static"], 2, LENGTH, draft=Ngram(2))
    asked = [Request(PROMPTS[2], 12), Request(PROMPTS[4], 12, Sampling(1.2, top_k=30, seed=3))]
    played = Played(engine, [("add", request) for request in asked])
    assert [event.token for event in played.events[0]] == alone("static", asked[0])
    alone_ = generate(RUNNERS["static"], [asked[1].ids], 12, asked[1].sampling, draft=Ngram(2)).completions[0].tokens
    assert [event.token for event in played.events[1]] == alone_


# ---- what must not be, planted ---------------------------------------------------------------------------------


def unlike(actions: Sequence[Action] = MIXED) -> bool:
    """Whether a row answers otherwise than alone."""
    wanted = {request: alone("static", request) for kind, request in actions if kind == "add"}
    try:
        played = Played(Engine(RUNNERS["static"], 2, LENGTH), actions)
    except (AssertionError, IndexError, RuntimeError):
        return True
    said = {id: [event.token for event in events] for id, events in played.events.items()}
    return any(tokens != wanted[played.requests[id]][: len(tokens)] for id, tokens in said.items())


def test_defects_of_joining_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not unlike()
    set_rows, take = BatchSampler.set_rows, Row.take
    cache_rows = type(RUNNERS["static"].allocate(1, 8)).rows
    plants: dict[str, tuple[Any, str, Any]] = {
        "a joiner writes to row 0": (
            type(RUNNERS["static"].allocate(1, 8)), "rows", lambda self, first, count: cache_rows(self, 0, count)
        ),
        "a joiner's settings go to row 0": (BatchSampler, "set_rows", lambda self, first, *rest: set_rows(self, 0, *rest)),
        "what a row wrote is forgotten": (BatchSampler, "note", lambda self, token_B: None),
        "a row ends a token early": (
            Row, "take", lambda self, token, *rest: (self.launched > 3 and self.cancel()) or take(self, token, *rest)
        ),
    }  # fmt: skip
    for name, (where, what, defect) in plants.items():
        with monkeypatch.context() as patch:
            patch.setattr(where, what, defect)
            assert unlike(), name

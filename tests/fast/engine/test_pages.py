"""Pages of keys and values: shared, kept, taken from the youngest; and prompts that are read by chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast.build import build, rebuild
from llama_fast.caches.paged import Paged, PagedCache, slots_at
from llama_fast.caches.static import Static
from llama_fast.engine.caches import Caches
from llama_fast.engine.engine import Engine
from llama_fast.engine.generate import generate
from llama_fast.engine.pages import Pages
from llama_fast.engine.request import Event, Request
from llama_fast.engine.room import SharedPages
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import Sampling
from llama_fast.plan import Plan
from llama_fast.speculative.proposers import Ngram
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.questions.judge import Bench
from oracle.questions.threads import judge_ranks
from oracle.verify import references

CONFIG = LlamaConfig(48, 2, 6, 2, 10, 72, 101, 96)
APART = build(random_checkpoint(CONFIG, 3), Plan(cache=Static(multiple=8), fuse_projections=True), "cpu")
BEGIN = (5, 17, 3, 44, 61, 20, 9, 33, 70)


def paged(tokens: int | None = None, page: int = 4) -> Runner:
    return rebuild(APART, dataclasses.replace(APART.plan, cache=Paged(tokens, page)))


def alone(request: Request) -> list[int]:
    """What a request is answered in slots of its own."""
    return generate(APART, [request.ids], request.max_new_tokens, request.sampling).completions[0].tokens


def said_by(engine: Engine, requests: Sequence[Request], steps_between: int = 0) -> list[list[int]]:
    """The tokens of these requests, each of which comes so many steps after the one before."""
    events: list[Event] = []
    ids = []
    for request in requests:
        ids.append(engine.add(request))
        for _ in range(steps_between):
            events += engine.step()
    while engine.busy:
        events += engine.step()
    return [[event.token for event in events if event.id == id] for id in ids]


def pages_of(engine: Engine) -> Pages:
    assert isinstance(engine.room, SharedPages)
    return engine.room.pages


def test_a_row_begins_behind_the_longest_beginning_that_any_row_left() -> None:
    engine = Engine(paged(), 2, 40)
    first = Request([*BEGIN, 1, 2], 8)
    assert said_by(engine, [first]) == [alone(first)] and engine.reused_tokens == 0
    again, longer = first, Request([*BEGIN, 1, 2, *alone(first), 8, 9], 5, Sampling(0.9, seed=4))
    other = Request([6, *BEGIN[1:], 1, 2], 5)
    assert said_by(engine, [again]) == [alone(first)]
    assert engine.reused_tokens == 8, "two full pages of the prompt but for its last token"
    assert said_by(engine, [longer]) == [alone(longer)]
    assert engine.reused_tokens == 8 + 16, "eleven of the prompt, and of the answer those that were read"
    assert said_by(engine, [other]) == [alone(other)]
    assert engine.reused_tokens == 8 + 16, "what differs at the beginning shares nothing"


def test_rows_that_run_share_the_pages_of_their_beginning() -> None:
    engine = Engine(paged(), 3, 40)
    requests = [Request([*BEGIN, n], 9, Sampling(1.0, seed=n)) for n in range(3)]
    ids = [engine.add(request) for request in requests]
    events = engine.step()
    pages = pages_of(engine)
    assert sorted(pages.holders, reverse=True)[:3] == [3, 3, 1], "two pages of nine tokens, held by three rows"
    assert engine.reused_tokens == 16
    while engine.busy:
        events += engine.step()
    for id, request in zip(ids, requests, strict=True):
        assert [event.token for event in events if event.id == id] == alone(request)
    assert pages.available == pages.count and sum(pages.holders) == 0 and pages.kept > 0


@pytest.mark.parametrize("ahead", [0, 3])
def test_the_youngest_row_makes_way_and_goes_on_where_it_was(ahead: int) -> None:
    """Three rows that come to need 27 pages have ten: nobody's text changes, and the oldest is never set back."""
    engine = Engine(paged(tokens=40), 3, 36)
    engine.steps.readback.depth = ahead  # type: ignore[attr-defined]
    requests = [
        Request(BEGIN, 24),
        Request([1, 2], 24, Sampling(0.9, frequency_penalty=2.0, logit_bias={9: 3.0, 17: 3.0}, seed=7)),
        Request([4, 4, 8], 24, Sampling(1.2, top_k=30, repetition_penalty=1.3, presence_penalty=1.5, seed=1)),
    ]
    assert said_by(engine, requests, steps_between=3) == [alone(request) for request in requests]
    assert engine.pre_emptions >= 2
    assert pages_of(engine).available == 10


def test_a_request_that_could_never_fit_is_refused_with_numbers() -> None:
    engine = Engine(paged(tokens=20), 2, 40)
    engine.add(Request(BEGIN, 12))
    with pytest.raises(
        ValueError, match="a prompt of 9 tokens and 13 new ones need 6 pages of 4 positions; the cache has 5"
    ):
        engine.add(Request(BEGIN, 13))
    while engine.busy:
        engine.step()


def test_a_row_waits_until_there_are_pages_for_it_and_others_do_not_overtake_it() -> None:
    engine = Engine(paged(tokens=40), 3, 40)
    requests = [Request([n] * 20, 12, Sampling(1.0, seed=n)) for n in range(3)]
    requests.append(Request([1], 2))
    firsts: list[int] = []
    for request in requests:
        engine.add(request)
    while engine.busy:
        firsts += [event.id for event in engine.step() if event.id not in firsts]
    assert firsts == [0, 1, 2, 3]


def test_cancelled_rows_give_their_pages_back_whatever_they_were_doing() -> None:
    engine = Engine(paged(tokens=48), 2, 40, chunk=4)
    reading, running = engine.add(Request([7] * 30, 4)), engine.add(Request([1, 2, 3], 9))
    waiting = engine.add(Request([9] * 12, 3))
    engine.step()
    for id in (waiting, reading, running):
        assert engine.cancel(id)
    pages = pages_of(engine)
    assert not engine.busy and pages.available == pages.count and sum(pages.holders) == 0
    told = Request([7] * 31, 5)
    assert said_by(engine, [told]) == [alone(told)] and engine.reused_tokens == 4, (
        "one page of the cancelled prompt was read"
    )


@pytest.mark.parametrize("cache", [Static(multiple=8), Paged(page=4)], ids=["static", "paged"])
def test_a_long_prompt_is_read_by_chunks_between_the_steps_of_others(
    cache: Static | Paged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is read every step brings the running rows their tokens, and reads no more of a prompt than a chunk."""
    runner = rebuild(APART, dataclasses.replace(APART.plan, cache=cache))
    engine, read = Engine(runner, 3, 80, chunk=16), []
    begin = Runner.begin_prompt
    monkeypatch.setattr(
        Runner, "begin_prompt", lambda self, ids, *rest: read.append(ids.shape[1]) or begin(self, ids, *rest)
    )
    requests = [Request([1, 2], 40, Sampling(1.0, seed=2)), Request([3], 30), Request([n % 101 for n in range(70)], 4)]
    said: list[list[int]] = [[], [], []]
    for request in requests[:2]:
        engine.add(request)
    for _ in range(3):
        for event in engine.step():
            said[event.id].append(event.token)
    engine.add(requests[2])
    read.clear()
    for step in range(4):
        told = [event.id for event in engine.step()]
        assert len(read) == step + 1 and max(read) <= 16
        assert told == [0, 1], "the others go on, and the long row has no token yet"
        for id in told:
            said[id] = []
    engine.close()
    monkeypatch.undo()
    engine = Engine(runner, 3, 80, chunk=16)
    assert said_by(engine, requests, steps_between=2) == [alone(request) for request in requests]


def test_a_chunk_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="chunk=0"):
        Engine(APART, 1, 40, chunk=0)


def test_kept_prefixes_are_refused_with_a_draft() -> None:
    with pytest.raises(ValueError, match="keeps_prefixes: with a draft every prompt is read from its beginning"):
        Engine(APART, 1, 40, draft=Ngram(2), keeps_prefixes=True)


def test_speculation_has_all_its_pages_from_the_start() -> None:
    engine = Engine(paged(tokens=64), 3, 30, draft=Ngram(3))
    requests = [Request([*BEGIN, *BEGIN, n], 10) for n in range(3)]
    assert said_by(engine, requests) == [alone(request) for request in requests]
    assert engine.pre_emptions == 0 and engine.reused_tokens == 0


def test_a_cache_without_an_engine_gives_pages_as_they_are_asked_for() -> None:
    """Two rows of 20 in a pool of 24 fit where they are short; where they are not, it is said."""
    runner = paged(tokens=24)
    cache = runner.allocate(2, 20)
    tokens_BT = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 0, 0, 0]])
    lengths_B = torch.tensor([5, 2])
    assert torch.allclose(
        runner.prefill(tokens_BT, lengths_B, cache),
        APART.prefill(tokens_BT, lengths_B, APART.allocate(2, 20)),
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="2 rows of 20 positions do not fit the 6 pages of 4"):
        runner.score(torch.randint(0, 101, (2, 20)))


def test_a_cache_whose_pages_an_engine_assigns_is_written_by_nobody_else() -> None:
    runner = paged()
    cache = runner.allocate(1, 20)
    assert generate(runner, [[5, 6, 7]], 4, cache=cache).completions[0].tokens == alone(Request([5, 6, 7], 4))
    assert generate(runner, [[5, 6]], 4, cache=cache).completions[0].tokens == alone(Request([5, 6], 4)), (
        "by the next engine"
    )
    with pytest.raises(ValueError, match="an engine assigns its pages, and these rows have none"):
        runner.prefill(torch.tensor([[5, 6, 7]]), torch.tensor([3]), cache)


def test_a_cache_of_pages_is_kept_for_the_next_generation() -> None:
    caches = Caches(paged())
    cache = caches.take(2, 40)
    engine = Engine(caches.runner, 2, 40, cache)
    said_by(engine, [Request(BEGIN, 3)])
    assert cache.length < 40, "attention looks at what there is"
    caches.put_back(cache)
    assert caches.take(2, 40) is cache


def test_two_ranks_hold_their_heads_keys_in_pages() -> None:
    checkpoint = random_checkpoint(CONFIG, 5)
    plan = dataclasses.replace(APART.plan, cache=Paged(page=4))
    bench = Bench(*references(build(checkpoint, plan, "cpu"), checkpoint))
    assert judge_ranks(checkpoint, plan, torch.float32, bench).outcome.value == "AGREE"


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: Paged(page=12), "page=12 must be a power of two"),
        (lambda: Paged(page=1), "page=1 must be a power of two, and at least 2"),
        (lambda: Paged(tokens=3, page=4), "tokens=3 do not fill one page of 4"),
        (lambda: Paged(tokens="many"), "tokens='many'"),
    ],
)
def test_what_is_no_pool_is_refused(made: object, told: str) -> None:
    assert callable(made)
    with pytest.raises((ValueError, TypeError), match=told):
        made()


def test_a_position_stands_in_its_page() -> None:
    pages_BP = torch.tensor([[2, 5], [7, 0]])
    assert slots_at(pages_BP, torch.tensor([[0, 3, 6], [1, 3, 4]]), 4).tolist() == [[8, 11, 22], [29, 31, 0]]


def test_every_row_is_read_by_way_of_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a compiler that records addresses records one pass for all slots; what is written is the row's own."""
    runner = dataclasses.replace(paged())
    seen: list[tuple[int, int]] = []
    read = runner.run_prefill

    def watched(model: object, ids: torch.Tensor, where: object, cache: PagedCache, choose: object) -> object:
        seen.append((id(cache), cache.table.pages_BP.data_ptr()))
        return read(model, ids, where, cache, choose)

    engine = Engine(dataclasses.replace(runner, run_prefill=watched), 3, 40, chunk=4)
    requests = [Request([n, *BEGIN[n:]], 7, Sampling(1.0, seed=n)) for n in range(3)]
    assert said_by(engine, requests, steps_between=2) == [alone(request) for request in requests]
    assert len(seen) >= 6 and len(set(seen)) == 1


def test_a_rows_table_at_the_common_address_follows_the_rows() -> None:
    cache = Paged(page=4).allocate(CONFIG, 3, 16, torch.float32, torch.device("cpu"))
    assert isinstance(cache, PagedCache)
    for row in range(3):
        cache.assign(row, [4 * row + 1, 4 * row + 2])
    seat = cache.seat(1)
    assert seat.batch == 1 and seat.table.pages_BP[0].tolist() == cache.table.pages_BP[1].tolist()
    address = seat.table.pages_BP.data_ptr()
    assert cache.seat(2) is seat and seat.table.slots_at(torch.tensor([[5]])).tolist() == [[10 * 4 + 1]]
    cache.assign(2, [3], first=1)
    assert (
        seat.table.slots_at(torch.tensor([[5]])).tolist() == [[3 * 4 + 1]] and seat.table.pages_BP.data_ptr() == address
    )
    short = Paged(tokens=8, page=4).allocate(
        CONFIG, 2, 16, torch.float32, torch.device("cpu")
    )  # pages as they are asked for
    assert isinstance(short, PagedCache)
    short.seat(1).reserve(torch.tensor([0]), 5)
    assert short.seat(1).table.pages_BP[0, :2].tolist() == [1, 2] == short.table.pages_BP[1, :2].tolist()


def test_attention_reads_what_was_put_in_order_whichever_pages_hold_it() -> None:
    generator = torch.Generator().manual_seed(1)
    cache = Paged(page=4).allocate(CONFIG, 2, 16, torch.float32, torch.device("cpu"))
    assert isinstance(cache, PagedCache)
    cache.assign(0, [3, 1])
    cache.assign(1, [4, 2, 5])
    k_BTKd, v_BTKd = (torch.randn(2, 8, 2, 10, generator=generator) for _ in range(2))
    position_BT = torch.arange(8).expand(2, 8)
    layer = cache.layers[1]
    layer.put(k_BTKd, v_BTKd, position_BT)
    assert torch.equal(layer.k[:, :, :8], k_BTKd.transpose(1, 2)) and torch.equal(
        layer.v[:, :, :8], v_BTKd.transpose(1, 2)
    )
    cache.see(2)
    assert layer.k.shape == (2, 2, 8, 10) and cache.length == 8
    rows = [(part, k, v) for part, k, v in layer.parts()]
    assert torch.equal(torch.cat([k for _, k, _ in rows]), layer.k) and [part.start for part, _, _ in rows] == [0]
    part = cache.rows(1, 1)
    cache.assign(1, [6], first=1)
    part.layers[1].put(k_BTKd[1:, :1], v_BTKd[1:, :1], position_BT[1:, 7:])
    assert torch.equal(cache.layers[1].k[1, :, 7], k_BTKd[1, 0]), (
        "a part's table is that of the whole, also when it changes"
    )
    assert torch.equal(cache.layers[1].k[0], k_BTKd[0].transpose(0, 1)), "and the other row's keys stay"


tokens = st.lists(st.integers(0, 1), min_size=0, max_size=12)  # few ids: rows begin alike


@settings(max_examples=150)
@given(st.lists(tokens, min_size=1, max_size=30), st.integers(3, 9), st.randoms(use_true_random=False))
def test_a_page_that_is_found_holds_these_tokens_behind_exactly_those(
    rows: list[list[int]], count: int, random: object
) -> None:
    """A pool beside a model of it: what each page really holds, and behind what."""
    pages = Pages(count, 2)
    holds: dict[int, tuple[int, ...]] = {}  # by page: all tokens up to its end
    running: list[list[int]] = []
    for row in rows:
        found = pages.find(row)
        assert [holds[page] for page in found] == [tuple(row[: 2 * i + 2]) for i in range(len(found))]
        pages.hold(found)
        needed = -(-len(row) // 2) - len(found)
        while needed > pages.available and running:
            pages.release(running.pop(random.randrange(len(running))))  # type: ignore[attr-defined]
        if needed > pages.available:
            pages.release(found)
            continue
        held = [*found, *pages.take(needed)]
        assert len(set(held)) == len(held) and not any(set(held[len(found) :]) & set(other) for other in running)
        for i, page in enumerate(held[len(found) :], len(found)):
            holds[page] = tuple(row[: 2 * i + 2])
        pages.learn(row, held)
        running.append(held)
    for held in running:
        pages.release(held)
    assert pages.available == count and not any(pages.holders)

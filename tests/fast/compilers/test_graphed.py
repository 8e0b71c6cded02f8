"""Recorded phases on a machine without CUDA graphs: what is padded, what is recorded for whom, and what is overwritten.

In place of a CUDA graph stands one that runs the function again on its inputs, and writes over its results.
"""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.compilers.graphed import MOST_ROWS, Recorded, Recordings, padded_width, recorded_phases
from llama_fast.contracts import KVCache
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner, decode, prefill
from llama_fast.engine.sampling import BatchSampler, Sampling
from llama_fast.plan import Plan
from llama_fast.speculative.proposers import Ngram
from llama_ref.checkpoint import Checkpoint


class Rerun:
    """What a CUDA graph does, without one."""

    def __init__(self, function: Any, inputs: tuple[Tensor, ...], results: tuple[Tensor, Tensor]):
        self.function, self.inputs, self.results = function, inputs, results

    def replay(self) -> None:
        for held, new in zip(self.results, self.function(*self.inputs), strict=True):
            held.copy_(new)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that are recorded, in order."""
    import weakref

    shapes: list[tuple[int, ...]] = []

    def record(self: Recordings, cache: KVCache, inputs: tuple[Tensor, ...]) -> Recorded:
        shapes.append(tuple(inputs[0].shape))
        held = tuple(tensor.clone() for tensor in inputs)
        lent = weakref.ref(cache)  # a graph knows addresses, and keeps no cache alive
        results = tuple(torch.zeros_like(t) for t in self.function(self.model, cache, *held))
        return Recorded(Rerun(lambda *now: self.function(self.model, lent(), *now), held, results), held, results)  # type: ignore[arg-type]

    monkeypatch.setattr(Recordings, "record", record)
    return shapes


def both(checkpoint: Checkpoint, slots: int | None = None) -> tuple[Runner, Runner]:
    """A model as it is written, and by way of recordings."""
    plain = build(checkpoint, Plan(cache=Static(length=slots, multiple=1), fuse_projections=True), "cpu")
    run_prefill, run_decode = recorded_phases(prefill, decode, plain.model)
    return plain, dataclasses.replace(plain, run_prefill=run_prefill, run_decode=run_decode)


EDITED = Sampling(0.8, seed=6, frequency_penalty=0.9, presence_penalty=0.4, logit_bias={5: 2.0, 99: -100.0})


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.9, top_k=30, seed=4), Sampling(repetition_penalty=1.4), EDITED]
)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_texts_are_those_of_the_phases_as_written(
    checkpoint: Checkpoint, recorded: list[tuple[int, ...]], rows: int, sampling: Sampling
) -> None:
    """Short prompts and long, ragged, in a cache that ends with the last token; the second time everything is replayed."""
    plain, graphed = both(checkpoint)
    for longest in (1, 3, 9, 40):
        prompts = [[(5 * i + 3 * row + longest) % 101 for i in range(max(1, longest - 2 * row))] for row in range(rows)]
        for new_tokens in (1, 6, 30):
            wanted = generate(plain, prompts, new_tokens, sampling).completions
            cache = graphed.allocate(rows, max(2, longest) + new_tokens)
            for _ in range(2):
                assert generate(graphed, prompts, new_tokens, sampling, cache=cache).completions == wanted
    assert (rows, 1) in recorded and all(B * T <= MOST_ROWS for B, T in recorded)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, seed=4)], ids=["greedy", "sampled"])
def test_a_turn_is_replayed_behind_what_the_cache_holds_and_never_beyond_its_end(
    checkpoint: Checkpoint, recorded: list[tuple[int, ...]], sampling: Sampling
) -> None:
    """Three turns of unequal starts: the padding of the last would reach past the last slot, so it runs as written."""
    plain, graphed = both(checkpoint)
    tokens_BL = torch.randint(101, (2, 40), generator=torch.Generator().manual_seed(1))
    rows_B1 = torch.arange(2)[:, None]
    found, chosen = [], []
    for runner in (plain, graphed):
        cache, seen = runner.allocate(2, 29), []
        choose = runner.prepared(BatchSampler(sampling, sampling.seeds(2), torch.device("cpu")), 40)
        runner.start(tokens_BL[:, :6], torch.tensor([6, 4]), cache, choose)
        for start, T in (([6, 4], 5), ([11, 9], 6), ([17, 15], 6), ([23, 21], 6)):
            start_B = torch.tensor(start)
            at_BT = start_B[:, None] + torch.arange(T)
            lengths_B = torch.tensor([T, T])
            token_B, logits_BV = runner.extend(tokens_BL[rows_B1, at_BT], start_B, lengths_B, cache, choose)
            seen.append(logits_BV.clone())
            chosen.append(token_B.tolist())
        found.append(torch.stack(seen))
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=2e-5)
    assert chosen[:4] == chosen[4:]
    assert recorded == [(2, 8), (2, 8)], "the first prompt, and the turns as one"


def test_few_tokens_of_many_rows_are_recorded_and_many_are_not(
    checkpoint: Checkpoint, recorded: list[tuple[int, ...]]
) -> None:
    plain, graphed = both(checkpoint)
    for longest, width in ((6, 8), (9, None)):
        assert padded_width(20, longest) == width
        prompts = [[(5 * i + 3 * row) % 101 for i in range(longest - row % 3)] for row in range(20)]
        wanted = generate(plain, prompts, 4).completions
        cache = graphed.allocate(20, 16)
        assert all(generate(graphed, prompts, 4, cache=cache).completions == wanted for _ in range(2))
    assert (20, 8) in recorded and (20, 16) not in recorded and padded_width(200, 8) is None


def test_proposals_are_verified_by_recordings(checkpoint: Checkpoint, recorded: list[tuple[int, ...]]) -> None:
    plain, graphed = both(checkpoint)
    prompts = [[1, 2, 3, 1, 2, 3, 1, 2], [7, 8, 7, 8, 7]]
    wanted = generate(plain, prompts, 40).completions
    assert generate(graphed, prompts, 40, draft=Ngram(k=3)).completions == wanted
    assert (2, 4) in recorded


def test_a_score_records_nothing(checkpoint: Checkpoint, recorded: list[tuple[int, ...]]) -> None:
    plain, graphed = both(checkpoint)
    tokens_BT = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    torch.testing.assert_close(graphed.score(tokens_BT), plain.score(tokens_BT))
    assert recorded == []


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.9, top_k=30, seed=4), EDITED], ids=["greedy", "drawn", "edited"]
)
def test_what_follows_a_prompt_is_compiled_with_it_and_leaves_nothing_behind(
    untied: Checkpoint, recorded: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    """Here what is to be compiled is run, as where nothing can be compiled ahead: a step over one block, in an uneven cache."""
    plain, _ = both(untied)
    ahead: list[tuple[int, torch.Size]] = []

    def logged_decode(model: Any, tokens_BT: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        ahead.append((len(model.blocks), tokens_BT.shape))
        return decode(model, tokens_BT, *rest)

    monkeypatch.setattr(type(plain.model.operations), "compile_ahead", lambda self, run, rows: run())
    run_prefill, run_decode = recorded_phases(prefill, logged_decode, plain.model)
    graphed = dataclasses.replace(plain, run_prefill=run_prefill, run_decode=run_decode)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    assert generate(graphed, prompts, 6, sampling).completions == generate(plain, prompts, 6, sampling).completions
    assert ahead[0] == (1, (2, 1)), "the step of one block, before the first of them all"
    assert (len(plain.model.blocks), (2, 1)) in ahead and len(plain.model.blocks) > 1

    drawn = Sampling(0.9, seed=4)
    before, after = (runner.allocate(2, 12) for runner in (plain, graphed))
    tokens_BL, lengths_B = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]]), torch.tensor([2, 3])
    for runner, cache in ((plain, before), (graphed, after)):
        choose = runner.prepared(BatchSampler(drawn, drawn.seeds(2), torch.device("cpu")), 12)
        runner.start(tokens_BL[:, :4], torch.tensor([4, 2]), cache, choose)
        runner.extend(tokens_BL[:, 4:], torch.tensor([4, 2]), lengths_B, cache, choose)
    for one, other in zip(before.layers, after.layers, strict=True):
        for row, end in enumerate((6, 5)):
            torch.testing.assert_close(one.k[row, :, :end], other.k[row, :, :end], atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(one.v[row, :, :end], other.v[row, :, :end], atol=2e-5, rtol=2e-5)


def test_recordings_go_with_their_cache(untied: Checkpoint, recorded: list[tuple[int, ...]]) -> None:
    _, graphed = both(untied)
    recordings = Recordings(graphed.model, lambda model, cache, tokens_BT, start_B: (tokens_BT, start_B))
    caches = [graphed.allocate(1, 8) for _ in range(3)]
    for cache in caches:
        recordings(cache, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert len(recordings.known) == 3
    del cache, caches[1:]
    gc.collect()
    assert len(recordings.known) == 1


@pytest.mark.parametrize(
    ("B", "T", "width"),
    [
        (1, 2, 8),
        (1, 9, 16),
        (1, 128, 128),
        (1, 129, None),
        (4, 3, 4),
        (3, 2, 2),
        (9, 2, 2),
        (9, 9, None),
        (65, 2, 2),
        (129, 8, None),
    ],
)
def test_prompts_are_padded_to_few_widths(B: int, T: int, width: int | None) -> None:
    assert padded_width(B, T) == width

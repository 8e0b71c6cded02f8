"""The decode loop against decoding by recomputation, with unequal rows, ends and seeds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.contracts import KVCache
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.generate import generate, stream
from llama_fast.engine.request import requests_of
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import Sampling
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint
from llama_ref.generate import Adjusted, greedy
from llama_ref.model import Llama as Reference

PROMPTS = [[5, 17, 3], [88], [4, 4, 4, 61, 20, 9, 33], [1, 2]]
PLANS = [Plan(), Plan(Int8(), cache=Static(), fuse_projections=True)]


@pytest.fixture(params=PLANS, ids=str)
def runner(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Runner:
    return build(checkpoint, request.param, "cpu")


def test_greedy_is_the_references_row_by_row(runner: Runner) -> None:
    reference = Reference(runner.checkpoint.config, runner.reference_weights(), torch.float32)
    done = generate(runner, PROMPTS, 20)
    assert [c.tokens for c in done.completions] == [greedy(reference, prompt, 20) for prompt in PROMPTS]
    assert [c.prompt_tokens for c in done.completions] == [3, 1, 7, 2]
    assert done.new_tokens == 80 and 0 < done.first_token_seconds <= done.total_seconds


def test_greedy_with_biases_and_penalties_is_the_references(runner: Runner) -> None:
    """The same wish for four unequal rows, whose prompts hold tokens that the two penalties must not count."""
    reference = Reference(runner.checkpoint.config, runner.reference_weights(), torch.float32)
    plain = [c.tokens for c in generate(runner, PROMPTS, 20).completions]
    wish = Adjusted(1.2, 0.8, 0.5, {plain[0][0]: 1.5, 4: 2.0, 61: -100.0})
    sampling = Sampling(repetition_penalty=1.2, frequency_penalty=0.8, presence_penalty=0.5, logit_bias=wish.logit_bias)
    found = [c.tokens for c in generate(runner, PROMPTS, 20, sampling).completions]
    assert found == [greedy(reference, prompt, 20, adjusted=wish) for prompt in PROMPTS]
    assert found != plain


def test_a_cache_goes_with_its_engine(runner: Runner) -> None:
    """At once, and not when Python looks for circles: on a GPU it is gigabytes."""
    import gc
    import weakref

    caches: list[weakref.ref[object]] = []

    def allocated(batch: int, length: int) -> KVCache:
        cache = Runner.allocate(runner, batch, length)
        caches.append(weakref.ref(cache))
        return cache

    watched = dataclasses.replace(runner)
    object.__setattr__(watched, "allocate", allocated)
    gc.collect()
    gc.disable()
    try:
        generate(watched, PROMPTS, 4, Sampling(frequency_penalty=1.0))
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


def test_rows_end_at_every_eos_id_and_the_others_go_on(runner: Runner) -> None:
    whole = [c.tokens for c in generate(runner, PROMPTS, 20).completions]
    eos_ids = {whole[0][4], whole[2][9]}
    ended = generate(runner, PROMPTS, 20, eos_ids=eos_ids).completions
    for row, (tokens, completion) in enumerate(zip(whole, ended, strict=True)):
        first = next((i for i, token in enumerate(tokens) if token in eos_ids), None)
        assert completion.tokens == (tokens if first is None else tokens[: first + 1]), row
        assert completion.finish_reason == ("length" if first is None else "stop")


def test_sampling_repeats_with_its_seed_and_rows_do_not_touch(runner: Runner) -> None:
    sampling = Sampling(temperature=1.0, top_k=50, seed=11)
    together = [c.tokens for c in generate(runner, PROMPTS, 12, sampling).completions]
    assert together == [c.tokens for c in generate(runner, PROMPTS, 12, sampling).completions]
    for b, prompt in enumerate(PROMPTS):
        alone = generate(runner, [prompt], 12, Sampling(temperature=1.0, top_k=50, seed=11 + b))
        assert alone.completions[0].tokens == together[b]
    other = [c.tokens for c in generate(runner, PROMPTS, 12, Sampling(temperature=1.0, top_k=50, seed=99)).completions]
    assert other != together


def test_sampled_first_tokens_follow_the_models_distribution(untied: Checkpoint) -> None:
    """4000 rows with seeds of their own: chi square over tokens of expected count >= 5, false-alarm rate ~1e-6."""
    runner = build(untied, Plan(cache=Static()), "cpu")
    rows = 4000
    logits_V = runner.score(torch.tensor([[5, 17, 3]]))[0, -1]
    expected_V = logits_V.double().softmax(-1) * rows
    done = generate(runner, [[5, 17, 3]] * rows, 1, Sampling(temperature=1.0))
    counts_V = torch.bincount(torch.tensor([c.tokens[0] for c in done.completions]), minlength=101)
    cells = expected_V >= 5
    chi = float(((counts_V - expected_V) ** 2 / expected_V)[cells].sum())
    degrees = int(cells.sum())
    assert degrees > 20
    assert chi < degrees + 4.9 * (2 * degrees) ** 0.5 + 16  # Laurent-Massart: P(chi > k + 2 sqrt(kt) + 2t) <= e^-t


def test_a_static_cache_serves_one_request_after_another(untied: Checkpoint) -> None:
    runner = build(untied, Plan(cache=Static(length=64)), "cpu")
    cache = runner.allocate(2, 64)
    long, short = [[1] * 30, [2] * 20], [[3], [4, 5]]
    generate(runner, long, 30, cache=cache)
    assert generate(runner, short, 9, cache=cache).completions == generate(runner, short, 9).completions


def test_the_stream_is_the_completion(runner: Runner) -> None:
    steps = list(stream(runner, requests_of(PROMPTS, 6)))
    assert [[event and event.token for event in row] for row in zip(*steps, strict=True)] == [
        c.tokens for c in generate(runner, PROMPTS, 6).completions
    ]


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1]], 0, "max_new_tokens=0"),
        ([[1]], -3, "max_new_tokens=-3"),
        ([[1], []], 3, "a prompt is empty"),
        ([], 3, "a prompt is empty"),
        ([[1], [101]], 3, "token id 101 is outside the vocabulary of 101"),
        ([[1], [-1]], 3, "token id -1 is outside the vocabulary of 101"),
        ([[1] * 120], 9, "a prompt of 120 tokens and 9 new ones exceed the model's context of 128"),
    ],
)
def test_bad_requests_are_refused_with_their_numbers(
    untied: Checkpoint, prompts: list[list[int]], new: int, message: str
) -> None:
    runner = build(untied, Plan(), "cpu")
    with pytest.raises(ValueError, match=message):
        generate(runner, prompts, new)

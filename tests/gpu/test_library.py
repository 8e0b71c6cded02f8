"""The generation API on a GPU: every sampling option without a host sync, batches as rows, conversations over kept keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama_fast import Llama, Plan, build
from llama_fast import recipes as presets
from llama_fast.chat import Chat
from llama_fast.engine.generate import stream
from llama_fast.engine.request import requests_of
from llama_fast.engine.sampling import Sampling
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.tokenizer import RandomTokenizer
from oracle.questions.cases import random_row
from oracle.questions.judge import Bench
from oracle.statistics.compare import Outcome
from oracle.subjects.fast import FastSubject
from oracle.verify import references

pytestmark = pytest.mark.gpu
CONFIG = LlamaConfig(512, 4, 8, 2, 64, 1024, 1003, 1024)
LENGTHS = (3, 41, 1, 17, 90, 8, 33, 64)
PLANS = {"static": presets.optimised(), "fused": presets.fused(), "compiled": presets.optimised(compile=True)}
FULL = Sampling(1.1, 50, 0.9, (1, 2), 0.01, 1.2)


def runner(plan: Plan) -> Any:
    return build(random_checkpoint(CONFIG, 3, "cuda", torch.bfloat16), plan, "cuda", torch.bfloat16)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 50), FULL], ids=["greedy", "sampled", "everything"])
def test_no_step_waits_for_the_device(plan: str, sampling: Sampling) -> None:
    built, rows = runner(PLANS[plan]), [random_row(1003, 9, 1), random_row(1003, 5, 2)]
    cache = built.allocate(2, 128)
    for _ in range(2):  # compiled, and recorded
        list(stream(built, requests_of(rows, 12, sampling, logprobs=3), cache))
    steps = stream(built, requests_of(rows, 40, sampling, logprobs=3), cache)
    next(steps)  # prompts come from the host, and may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        rest = list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(rest) == 39 and all(event is not None and event.logprob for step in rest for event in step)


@pytest.mark.parametrize("plan", ["static", "fused"])
@pytest.mark.parametrize("encoding", ["dense", "int8"])
def test_a_ragged_batch_answers_as_its_rows_do_alone(plan: str, encoding: str) -> None:
    kind = presets.encoding_named(encoding)
    built = runner(presets.fused(kind) if plan == "fused" else presets.optimised(kind))
    bench = Bench(*references(built, built.checkpoint))
    prompts = [random_row(1003, length, seed) for seed, length in enumerate(LENGTHS)]
    for batch in (8, 1):
        verdict = bench.greedy(FastSubject(built, batch=batch), prompts, 32)
        assert verdict.outcome is Outcome.AGREE, (batch, verdict.failures)


@pytest.mark.parametrize("plan", PLANS)
def test_a_turn_over_kept_keys_is_judged_as_a_whole_one(plan: str) -> None:
    """Rounding differs where the prompt is read in parts, so the oracle judges instead of equality."""
    built = runner(PLANS[plan])
    chat = Chat(Llama(built, RandomTokenizer(1003, None, ())), None, 24)
    bench, seen = Bench(*references(built, built.checkpoint)), 0
    for text in ("hello there", "and more of it", "again"):
        list(chat.say(text))
        seen += chat.reused_tokens
        assert chat._engine is not None
        held = chat._engine.kept(0)
        verdict = bench.prefill(FastSubject(built), [held])
        assert verdict.outcome is Outcome.AGREE, verdict.failures
        known = bench.of([held])[0][0]
        said = held[chat.prompt_tokens :]
        for at, token in enumerate(said, chat.prompt_tokens - 1):  # the truth's choice, or as good as tied with it
            assert float(known[at].max() - known[at][token]) < 0.2
    assert seen > 0

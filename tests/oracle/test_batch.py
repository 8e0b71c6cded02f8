"""Eight ragged prompts at once against the same prompts alone: the oracle says AGREE of both, and ties are ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama_fast.build import build
from llama_fast.recipes import encoding_named, optimised
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.questions.cases import random_row
from oracle.questions.judge import Bench
from oracle.statistics.compare import Outcome
from oracle.subjects.fast import FastSubject
from oracle.verify import references

CONFIG = LlamaConfig(64, 3, 6, 2, 10, 96, 211, 256)
LENGTHS = (3, 41, 1, 17, 90, 8, 33, 64)
NEW_TOKENS = 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("encoding", ["dense", "int8"])
def test_a_ragged_batch_answers_as_its_rows_do_alone(encoding: str, dtype: torch.dtype) -> None:
    checkpoint = random_checkpoint(CONFIG, 8)
    runner = build(checkpoint, optimised(encoding_named(encoding)), "cpu", dtype)
    bench = Bench(*references(runner, checkpoint))
    prompts = [random_row(CONFIG.vocab_size, length, seed) for seed, length in enumerate(LENGTHS)]
    done: dict[int, Any] = {}
    for batch in (8, 1):
        subject = FastSubject(runner, batch=batch)
        done[batch] = subject.greedy(prompts, NEW_TOKENS)
        verdict = bench.greedy(subject, prompts, NEW_TOKENS).named(f"batch of {batch}")
        rows = [[*prompt, *tokens] for prompt, (tokens, _) in zip(prompts, done[batch], strict=True)]
        verdict += bench.decode(subject, rows, list(LENGTHS), [len(row) for row in rows]).named("token by token")
        assert verdict.outcome is Outcome.AGREE, verdict.failures
    assert len(done[8]) == len(done[1]) == 8 and all(len(tokens) == NEW_TOKENS for tokens, _ in done[8])
    same = sum(together == alone for (together, _), (alone, _) in zip(done[8], done[1], strict=True))
    # every token is the argmax of its own logits or a tie of truth's (asked above): rows may part at a tie, and only there
    assert same == 8 if dtype is torch.float32 else same >= 4


def test_a_row_that_leaks_into_its_neighbour_is_seen() -> None:
    """The check can fail: a runner whose first row's keys are everybody's."""
    checkpoint = random_checkpoint(CONFIG, 8)
    runner = build(checkpoint, optimised(), "cpu", torch.float32)
    bench = Bench(*references(runner, checkpoint))
    prompts = [random_row(CONFIG.vocab_size, length, seed) for seed, length in enumerate(LENGTHS)]
    block: Any = runner.model.blocks[1]
    original = block.qkv.forward

    def leaking(x: torch.Tensor) -> Any:
        q, k, v = original(x)
        return q, k[:1].expand_as(k), v

    block.qkv.forward = leaking
    assert bench.greedy(FastSubject(runner, batch=8), prompts, 8).outcome is Outcome.DIFFER

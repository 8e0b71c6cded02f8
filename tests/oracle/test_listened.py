"""What a generation's tokens came from is told as the runner computed it, whoever proposes tokens and whenever a row ends."""

from __future__ import annotations

import pytest
import torch

from llama_fast.build import build
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner
from llama_fast.recipes import optimised
from llama_fast.speculative.proposers import Ngram
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.subjects.listened import Said

ROWS = [[1, 2, 3, 1, 2, 3, 1, 2], [7, 8, 7], [5]]
CONFIG = LlamaConfig(
    dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=48, vocab_size=60, max_context=64
)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return build(random_checkpoint(CONFIG, 3), optimised(), "cpu", torch.float32)


@pytest.mark.parametrize("draft", [None, Ngram(k=3), Ngram(k=3, aligned=True)], ids=["plain", "proposals", "aligned"])
def test_the_logits_behind_each_token_are_those_of_the_whole_text(runner: Runner, draft: Ngram | None) -> None:
    ended = generate(runner, ROWS, 1).completions[1].tokens  # the second row ends with its first token
    for eos_ids in ((), ended):
        said = Said(runner)
        done = generate(said.runner, ROWS, 9, eos_ids=eos_ids, draft=draft)
        assert done.completions == generate(runner, ROWS, 9, eos_ids=eos_ids).completions
        for b, (row, completion) in enumerate(zip(ROWS, done.completions, strict=True)):
            n = len(completion.tokens)
            whole_TV = runner.score(torch.tensor([[*row, *completion.tokens]]))[0]
            logits_nV = said.behind(b, len(row), n, checked=draft is not None)
            assert logits_nV.shape == (n, 60) and logits_nV.argmax(-1).tolist() == completion.tokens
            torch.testing.assert_close(logits_nV, whole_TV[len(row) - 1 : -1], atol=1e-5, rtol=1e-5)
    assert [len(completion.tokens) for completion in done.completions][1] == 1


def test_of_several_calls_at_a_position_the_first_or_the_last_holds_and_a_token_without_any_is_not_a_number(
    runner: Runner,
) -> None:
    said = Said(runner)
    cache, choose = runner.allocate(2, 16), runner.greedy(2)
    said.runner.start(torch.tensor([[4, 5, 6], [9, 1, 0]]), torch.tensor([3, 2]), cache, choose)
    at_B, told = torch.tensor([4, 3]), []
    for tokens in ([7, 8], [9, 1]):  # 8, what was proposed first, was rejected
        _, logits_BTV = said.runner.step(torch.tensor([tokens, tokens]), at_B, cache, choose)
        told.append(logits_BTV)
        at_B += 1  # as the loop counts on, in place
    assert not torch.allclose(told[0][0, 1], told[1][0, 0])
    first_nV, last_nV = said.behind(0, 3, 5), said.behind(0, 3, 5, checked=True)
    assert first_nV.isnan().all(-1).tolist() == [False, True, False, False, False], "position 3 was passed over"
    torch.testing.assert_close(first_nV[2:], torch.cat([told[0][0], told[1][0, 1:]]))
    torch.testing.assert_close(last_nV[2:], torch.cat([told[0][0, :1], told[1][0]]))
    assert said.behind(1, 2, 6).isnan().all(-1).tolist() == [False, True, False, False, False, True]

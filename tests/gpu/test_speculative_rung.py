"""Speculation on a GPU: right under CUDA graphs, one wait a round, and what it wins on a 7B model.

`pytest -m gpu tests/gpu/test_speculative_rung.py -s` prints, for `random:llama-2-7b` in bf16 with its int8 twin as draft, both
fused: acceptance, cost of a proposal and of a check in plain steps, what the formula promises and what was measured.
"""

from __future__ import annotations

import os
import statistics

import pytest
import torch
from torch._dynamo.utils import counters

from llama_fast.build import build
from llama_fast.contracts import Encoding, KVCache
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.generate import Generation, generate
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import Sampling
from llama_fast.engine.speculation import Statistics
from llama_fast.plan import Plan
from llama_fast.recipes import fused, optimised
from llama_fast.speculative.adaptive_k import speedup
from llama_fast.speculative.proposers import Draft, Ngram, Proposer
from llama_fast.speculative.rounds import Readback, Rounds
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.models import resolve
from oracle.questions.speculation import judge_speculation

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

CONFIG = LlamaConfig(
    dim=256, n_layers=3, n_heads=8, n_kv_heads=2, head_dim=64, ffn_dim=512, vocab_size=1000, max_context=512
)
PROMPTS = [[5, 17, 3], [4, 4, 4, 61, 20, 9, 33]]
SAMPLED = Sampling(0.9, top_k=200, seed=3)
MODEL = os.environ.get("LLAMA_FAST_GPU_MODEL", "random:llama-2-7b")


def pair(compile: bool) -> tuple[Runner, Runner]:
    """A small target in bf16 and its int8 draft."""
    checkpoint = random_checkpoint(CONFIG, 1, torch.device("cuda"), torch.bfloat16)

    def plan(encoding: Encoding) -> Plan:
        return optimised(encoding, compile=True) if compile else fused(encoding)

    return build(checkpoint, plan(Dense()), "cuda"), build(checkpoint, plan(Int8()), "cuda")


@pytest.mark.parametrize("compile", [False, True], ids=["fused", "compiled"])
def test_streams_agree_and_nothing_recompiles(compile: bool) -> None:
    """Two unequal rows; a CUDA graph that overwrote what a round still reads would change tokens or acceptance."""
    torch._dynamo.reset()
    target, small = pair(compile)
    for draft in (Draft(small, 3), Ngram(3)):
        verdict = judge_speculation(target, target.checkpoint, draft, PROMPTS, 64, batch=2, cache_length=256)
        assert verdict.outcome.value == "AGREE", verdict
        cache = target.allocate(2, 128)
        first, second = (generate(target, PROMPTS, 60, SAMPLED, cache=cache, draft=draft) for _ in range(2))
        assert first.completions == second.completions
        warm = counters["stats"]["unique_graphs"]
        for seed in range(3):
            generate(target, PROMPTS, 60, Sampling(0.9, top_k=200, seed=seed), cache=cache, draft=draft)
        assert counters["stats"]["unique_graphs"] == warm
    twin = generate(target, PROMPTS, 60, SAMPLED, draft=Draft(target, 3)).speculation
    assert twin is not None and twin.acceptance > 0.97, "a draft that is the target falls by rounding alone"


@pytest.mark.parametrize("name", ["draft", "ngram"])
def test_one_wait_a_round(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first round and the last nothing but the readback of a round waits for the GPU."""
    target, small = pair(compile=False)
    cache, run = target.allocate(2, 128), Rounds.run
    draft = Draft(small, 3) if name == "draft" else Ngram(3)
    generate(target, PROMPTS, 60, SAMPLED, cache=cache, draft=draft)

    def strict(self: Rounds, *arguments: object) -> object:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(self, *arguments)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    pops, pop = [], Readback.pop
    monkeypatch.setattr(Rounds, "run", strict)
    monkeypatch.setattr(Readback, "pop", lambda self: pops.append(1) or pop(self))
    done = generate(target, PROMPTS, 60, SAMPLED, cache=cache, draft=draft)
    counted = done.speculation
    assert counted is not None and len(pops) - 1 <= counted.rounds, "rows of a round share its wait"


def timed(target: Runner, cache: KVCache, sampling: Sampling, draft: Proposer | None) -> tuple[float, Generation]:
    """Median tokens per second of three generations of 200 tokens, after one that warms up; and the last."""
    prompt = resolve(MODEL).tokenizer().encode("Hello, my name is")
    done = [generate(target, [prompt], 200, sampling, cache=cache, draft=draft) for _ in range(4)]
    return statistics.median(g.tokens_per_second for g in done[1:]), done[-1]


def test_seven_billion() -> None:
    cuda = torch.device("cuda")
    checkpoint = resolve(MODEL).open(cuda, torch.bfloat16)
    target, small = (build(checkpoint, fused(kind), cuda) for kind in (Dense(), Int8()))
    cache = target.allocate(1, 256)
    best = 0.0
    settings = {
        "greedy": Sampling(),
        "temperature 0.8, top-k 200": Sampling(0.8, top_k=200),
        "temperature 1": Sampling(1.0),
    }
    for name, sampling in settings.items():
        plain, _ = timed(target, cache, sampling, None)
        print(f"{name}: plain {plain:.1f} tokens/s")
        automatic = Draft(small)
        for k, draft in ((None, automatic), *((k, Draft(small, k)) for k in (4, 5, 7))):
            rate, done = timed(target, cache, sampling, draft)
            counted = done.speculation
            assert counted is not None
            promised = predicted(automatic, counted, k) if k else None
            text = f", formula {promised:.3f}x, measured / formula {rate / plain / promised:.3f}" if promised else ""
            print(
                f"  k={k or 'automatic'}: {rate:.1f} tokens/s = {rate / plain:.3f}x plain, acceptance "
                f"{counted.acceptance:.3f}, {counted.tokens_per_round:.2f} tokens per round, {counted.plain_steps} plain "
                f"steps{text}"
            )
            if k is None:
                print(
                    f"    c {counted.draft_cost}, v {counted.check_cost}, k {counted.ks}, {counted.notice or 'no notice'}"
                )
                assert rate >= 0.9 * plain, "where no k wins it must fall back"
            if promised:
                assert rate / plain >= 0.9 * promised
            if counted.acceptance >= 0.9:
                best = max(best, rate / plain)
    print(f"best ratio to plain at acceptance >= 0.9: {best:.3f}")
    assert best >= 1.25


def predicted(measured: Draft, counted: Statistics, k: int) -> float:
    """The formula at this acceptance, with the costs that the automatic runs before it measured."""
    costs = [*measured._costs.values()][-1]
    c, v = costs.c, costs.v(k)
    assert c is not None and v is not None
    return speedup(counted.acceptance, k, c, v)

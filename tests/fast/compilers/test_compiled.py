"""Compiled code is the same model, and stays compiled. Compilation is slow, so the models are tiny and few."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.compilers.compilation import own_code
from llama_fast.compilers.compiled import CPU_OPTIONS, Compiled, about_the_request
from llama_fast.contracts import Encoding
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import prefill
from llama_fast.engine.sampling import Sampling
from llama_fast.model.matvec import product
from llama_fast.plan import Plan
from llama_fast.recipes import optimised
from llama_ref.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("two_threads")


def twinned(checkpoint: Checkpoint) -> Checkpoint:
    """The same model in which tokens 50 to 99 have the logits of tokens 0 to 49."""
    head = checkpoint.weights["output.weight"][:].clone()
    head[50:100] = head[:50]
    return dataclasses.replace(checkpoint, weights={**checkpoint.weights, "output.weight": head})


@pytest.mark.parametrize(
    ("encoding", "dtype", "regions"),
    [(Dense(), torch.float32, False), (Int8(), torch.bfloat16, True)],
    ids=["dense-float32-whole", "int8-bfloat16-regions"],
)
def test_compiled_is_eager_and_nothing_recompiles(
    untied: Checkpoint, encoding: Encoding, dtype: torch.dtype, regions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    asked: set[str] = set()

    def watched(guards: Sequence[Any]) -> list[bool]:
        kept = about_the_request(guards)
        asked.update(f"{guard.name} {guard.guard_type}" for guard, keep in zip(guards, kept, strict=True) if keep)
        return kept

    monkeypatch.setitem(CPU_OPTIONS, "guard_filter_fn", watched)
    untied = twinned(untied)
    plan = Plan(encoding, cache=Static(length=96), compiler=Compiled(regions), fuse_projections=True)
    runner = build(untied, plan, "cpu", dtype)
    cache = runner.allocate(1, 96)
    sampling = Sampling(temperature=0.7, seed=5)
    generate(runner, [[3, 1, 4]], 4, cache=cache)
    generate(runner, [[3, 1, 4]], 4, sampling, cache=cache)
    warm = counters["stats"]["unique_graphs"]
    assert warm > 0
    eager = build(untied, Plan(encoding, cache=Static(length=96), fuse_projections=True), "cpu", dtype)
    for length in (1, 2, 50):
        prompt = [(7 * i + length) % 101 for i in range(length)]
        compiled_cache, eager_cache = cache, eager.allocate(1, 96)
        tokens_BT, lengths_B = torch.tensor([prompt + [0] * (2 - length)]), torch.tensor([length])
        torch.testing.assert_close(
            runner.prefill(tokens_BT, lengths_B, compiled_cache),
            eager.prefill(tokens_BT, lengths_B, eager_cache),
            atol=1e-4 if dtype is torch.float32 else 0.1,
            rtol=1e-3,
        )
        for step in range(6):
            token_B1, at_B = torch.tensor([[step * 11]]), lengths_B + step
            torch.testing.assert_close(
                runner.decode(token_B1, at_B, compiled_cache),
                eager.decode(token_B1, at_B, eager_cache),
                atol=1e-4 if dtype is torch.float32 else 0.1,
                rtol=1e-3,
            )
        generate(runner, [prompt], 20, Sampling(temperature=1.1, seed=length), cache=cache)
        edited = Sampling(frequency_penalty=0.4, presence_penalty=0.3, logit_bias={7: 0.5}, repetition_penalty=1.2)
        once, twice = (
            generate(one, [prompt], 12, edited, cache=kept) for one, kept in ((runner, cache), (eager, None))
        )
        if dtype is torch.float32:  # tokens are chosen behind the compiled step
            assert once.completions[0].tokens == twice.completions[0].tokens
        greedy = generate(runner, [prompt], 20, cache=runner.allocate(1, 96)).completions[0].tokens
        assert all(token < 50 or token == 100 for token in greedy), "of two equal logits the lower id is taken"
    assert counters["stats"]["unique_graphs"] == warm, "something was compiled again after warm-up"
    of_tensors = {f"{name} TENSOR_MATCH" for name in ("tokens_BT", "start_B", "cache.layers[0].k", "cache.layers[1].v")}
    assert of_tensors <= {name.replace("L['", "").replace("']", "") for name in asked}
    assert not any("model" in name for name in asked)


def test_lengths_beyond_the_compilers_limit(untied: Checkpoint) -> None:
    """PyTorch gives up on a function after eight compilations; here after one."""
    torch._dynamo.reset()
    plan = Plan(cache=Static(multiple=16), compiler=Compiled(), fuse_projections=True)
    runner = build(untied, plan, "cpu", torch.float32)
    with torch._dynamo.config.patch(recompile_limit=1):
        short, long = (generate(runner, [[3, 1, 4]], n).completions[0].tokens for n in (10, 20))
    assert long[:10] == short


def test_away_from_the_cpu_few_rows_and_many_are_one_graph() -> None:
    """The loop for few rows is a CPU's: on another device a short prompt must not be compiled beside a long one."""
    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(product, backend=counter, dynamic=True, fullgraph=True)
    weight = torch.empty(8, 16, device="meta")
    for rows in (9, 50, 2):
        run(torch.empty(rows, 16, device="meta"), weight)
    assert counter.frame_count == 1


def test_a_prompt_of_any_length_is_one_program(untied: Checkpoint) -> None:
    """As a GPU runs it, where prefill is compiled too: traced without a backend, for fresh prompts and for continuations."""
    runner = build(untied, optimised(), "cpu")
    traced = torch.compile(own_code(prefill), dynamic=True, fullgraph=True, backend="aot_eager")
    cache, plain = runner.allocate(2, 64), runner.allocate(2, 64)
    with torch.no_grad():
        for start in (None, torch.tensor([9, 5])):
            for T in (9, 6, 11):
                tokens_BT, lengths_B = torch.arange(2 * T).view(2, T) % 101, torch.tensor([T, T - 2])
                ours = traced(runner.model, tokens_BT, (start, lengths_B), cache, runner.greedy(2))[1]
                wanted = prefill(runner.model, tokens_BT, (start, lengths_B), plain, runner.greedy(2))[1]
                torch.testing.assert_close(ours, wanted)

"""Keys and values in eight bits on a GPU: PyTorch's integers beneath the kernels, as graphs, in pages, compiled."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama_fast.build import build, rebuild
from llama_fast.caches.paged import Paged
from llama_fast.caches.static import Static
from llama_fast.compilers.compiled import Compiled
from llama_fast.compilers.graphed import Graphed
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner
from llama_fast.plan import Plan
from llama_fast.recipes import fused, optimised
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.questions.cases import random_row
from oracle.report.certificate import Certificate
from oracle.statistics.compare import Outcome
from oracle.verify import _verify_eight_bits, references

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
CONFIG = LlamaConfig(
    dim=512, n_layers=3, n_heads=8, n_kv_heads=2, head_dim=64, ffn_dim=1024, vocab_size=1003, max_context=1024
)
PLANS = {
    "eager": optimised(),
    "graphed": dataclasses.replace(optimised(), compiler=Graphed()),
    "compiled": dataclasses.replace(optimised(), compiler=Compiled()),
    "fused": fused(),
}
KINDS = {"slots": Static(bits=8), "pages": Paged(page=16, bits=8)}


def built(plan: Plan, kind: str, dtype: torch.dtype) -> Runner:
    checkpoint = random_checkpoint(CONFIG, 0, torch.device("cuda"), dtype)
    return build(checkpoint, dataclasses.replace(plan, cache=KINDS[kind]), "cuda", dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["eager", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_oracle_agrees_with_what_is_kept_and_read(name: str, kind: str, dtype: torch.dtype) -> None:
    runner, certificate = built(PLANS[name], kind, dtype), Certificate({})
    rows = [random_row(1003, length, seed=length) for length in (70, 41, 9)]
    truth, yardstick = references(runner, runner.checkpoint)
    certificate.ask("eight bits", lambda: _verify_eight_bits(certificate, "", runner, truth, yardstick, rows))
    assert certificate.parts["eight bits"].outcome is Outcome.AGREE, certificate.parts["eight bits"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_recorded_steps_say_what_launched_ones_say(kind: str, rows: int) -> None:
    """The same kernels, as graphs and one by one: the same bits, at positions in the first split of attention and far behind."""
    graphs = built(PLANS["fused"], kind, torch.bfloat16)
    alone = rebuild(graphs, dataclasses.replace(graphs.plan, compiler=Plan().compiler))
    prompts = [random_row(1003, 3 + 29 * row, seed=row) for row in range(rows)]
    first, second = (generate(runner, prompts, 40).completions for runner in (graphs, alone))
    assert [one.tokens for one in first] == [one.tokens for one in second]


@pytest.mark.parametrize("name", PLANS)
def test_logits_are_near_those_of_all_bits(name: str) -> None:
    runner = built(PLANS[name], "slots", torch.bfloat16)
    exact = rebuild(runner, dataclasses.replace(runner.plan, cache=Static()))
    tokens_BT = torch.tensor([random_row(1003, 300, seed=row) for row in range(3)], device="cuda")
    found = []
    for one in (runner, exact):
        cache, lengths_B = one.allocate(3, 400), torch.tensor([290, 120, 200], device="cuda")
        one.prefill(tokens_BT, lengths_B, cache)
        found.append(one.decode(tokens_BT[:, -1:], lengths_B, cache).float().clone())
    apart = (found[0] - found[1]).norm() / found[1].norm()
    assert 0 < apart < 0.03, float(apart)

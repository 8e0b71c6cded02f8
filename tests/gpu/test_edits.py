"""On a GPU biases, penalties and grammars rule the tokens of every kind of plan, beside rows that ask for nothing."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from llama_fast.build import build
from llama_fast.engine.engine import Engine
from llama_fast.engine.generate import generate
from llama_fast.engine.guides import Guide
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import Sampling
from llama_fast.plan import Plan
from llama_fast.recipes import fused, optimised
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

CONFIG = LlamaConfig(
    dim=256, n_layers=3, n_heads=8, n_kv_heads=2, head_dim=32, ffn_dim=512, vocab_size=1000, max_context=512
)
TURNS = (5, 999, 40)


class Turns:
    """A grammar of one text: the three tokens, over and over, twelve in all."""

    ends = (0,)
    failure = None

    def __init__(self) -> None:
        self._at = 0

    def begin(self) -> Guide:
        return Turns()

    @property
    def complete(self) -> bool:
        return self._at == 12

    def allow(self, words_W: torch.Tensor) -> None:
        token = TURNS[self._at % 3]
        words_W.zero_()
        words_W[token // 32] = (1 << token % 32) if token % 32 < 31 else -(2**31)

    def take(self, token: int) -> None:
        assert token == TURNS[self._at % 3]
        self._at += 1


PLANS = {"eager": optimised(), "compiled": optimised(compile=True), "fused": fused()}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_edits_rule_their_rows_and_no_other(plan: Plan, temperature: float) -> None:
    """Biases of thousands and penalties of hundreds leave nothing to the model: what comes is known."""
    checkpoint = random_checkpoint(CONFIG, 0, torch.device("cuda"), torch.bfloat16)
    runner = build(checkpoint, plan, "cuda")
    bias = {7: 2e4, 31: 1.99e4}
    settings = [
        Sampling(temperature, seed=1, logit_bias=bias, frequency_penalty=200.0),
        Sampling(temperature, seed=2),
        Sampling(temperature, seed=3, grammar=Turns()),
        Sampling(temperature, seed=4, logit_bias=bias, presence_penalty=5000.0),
    ]
    alone = generate(runner, [[9] * 6], 20, settings[1]).completions[0].tokens
    engine = Engine(runner, rows=2, length=64)
    for one in settings * 2:
        engine.add(Request([9] * 6, 20, one))
    rows: list[list[int]] = [[] for _ in settings * 2]
    reasons = [""] * len(rows)
    while engine.busy:
        for event in engine.step():
            rows[event.id].append(event.token)
            reasons[event.id] = event.finish_reason or ""
    for again in (0, 4):
        assert rows[again] == [7, 31] * 10
        assert rows[again + 2] == [*TURNS] * 4 and reasons[again + 2] == "stop"
        assert rows[again + 3] == [7, 31] + [7] * 18
    if plan is PLANS["eager"]:
        assert rows[1] == rows[5] == alone  # elsewhere two rows are another shape, which rounds otherwise


def test_edits_compile_no_further_program() -> None:
    torch._dynamo.reset()
    checkpoint = random_checkpoint(CONFIG, 0, torch.device("cuda"), torch.bfloat16)
    runner = build(checkpoint, optimised(compile=True), "cuda")
    cache = runner.allocate(1, 250)
    for _ in range(2):
        generate(runner, [[5] * 9], 20, cache=cache)
    warm = counters["stats"]["unique_graphs"]
    for more in ({"frequency_penalty": 0.5}, {"logit_bias": {3: 2.0}}, {"grammar": Turns()}):
        generate(runner, [[5] * 9], 12, Sampling(0.7, **more), cache=cache)  # type: ignore[arg-type]
    assert counters["stats"]["unique_graphs"] == warm

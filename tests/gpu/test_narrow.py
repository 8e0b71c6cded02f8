"""Weights of a byte and less a column by our kernels on a GPU: against float64, as graphs, one row and several."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from llama_fast.build import build
from llama_fast.compilers.eager import Eager
from llama_fast.engine.generate import generate
from llama_fast.recipes import encoding_named, encodings, fused, optimised
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.* are widened at every step")]
NARROW = [name for name, kind in encodings().items() if kind.loader and name != "dense"]
CONFIG = LlamaConfig(
    dim=1024, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=128, ffn_dim=2816, vocab_size=5003, max_context=512
)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 20, 33])
@pytest.mark.parametrize(("n", "k"), [(1536, 1024), (4099, 2816)])
def test_a_product_is_the_decoded_matrixs(name: str, m: int, n: int, k: int) -> None:
    from llama_fast.kernels import ops
    from llama_fast.kernels.stored import LOADERS

    kind = encoding_named(name)
    generator = torch.Generator("cuda").manual_seed(n + m)
    dense = torch.randn(n, k, generator=generator, device="cuda") / math.sqrt(k)
    x = torch.randn(m, k, generator=generator, device="cuda")
    x[:, 7] *= 200
    x = x.bfloat16()
    parts = kind.encode(dense, torch.bfloat16)
    want = x.double() @ kind.decode(parts).double().T
    weight, scale = LOADERS[kind.loader](parts)
    if ops.takes(m, weight, x):
        got = ops.linear(x, weight, scale, dtype=torch.float32).double()
        # narrow weights of one row: 22 bits (20) of the largest activation; the offsets of int8 lose 1e-4; dots bf16's own
        assert (got - want).norm() / want.norm() < 2e-4
    by_torch = kind.product(x, parts).double()
    assert (by_torch - want).norm() / want.norm() < 4e-3, "what many rows take"


@pytest.mark.parametrize("name", NARROW)
def test_a_model_gives_the_logits_of_pytorchs_products(name: str) -> None:
    checkpoint = random_checkpoint(CONFIG, 3, "cuda", torch.bfloat16)
    kind = encoding_named(name)
    ours = build(checkpoint, fused(kind), "cuda")
    theirs = build(checkpoint, optimised(kind), "cuda")
    exact = build(checkpoint, optimised(kind), "cuda", torch.float32)
    ids = torch.randint(0, 5003, (2, 40), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    for B in (1, 2):
        caches = [runner.allocate(B, 64) for runner in (ours, theirs, exact)]
        lengths = torch.tensor([40, 31], device="cuda")[:B]
        logits = [r.prefill(ids[:B], lengths, c) for r, c in zip((ours, theirs, exact), caches)]
        for step in range(3):
            errors = [
                ((found.double() - logits[2].double()).norm() / logits[2].double().norm()).item()
                for found in logits[:2]
            ]
            assert errors[0] < 1.5 * errors[1] + 1e-4, (B, step, errors)
            token = logits[2].argmax(-1).view(B, 1)
            logits = [r.decode(token, lengths + step, c)[:, -1] for r, c in zip((ours, theirs, exact), caches)]


def test_recorded_steps_of_narrow_weights_are_those_launched_one_by_one() -> None:
    checkpoint = random_checkpoint(CONFIG, 3, "cuda", torch.bfloat16)
    kind = encoding_named("int4")
    recorded, launched = (
        build(checkpoint, plan, "cuda") for plan in (fused(kind), dataclasses.replace(fused(kind), compiler=Eager()))
    )
    for prompts in ([[5, 17, 3]], [[5, 17, 3], [9, 2]], [[1, 2]] * 12):
        texts = [generate(runner, prompts, 24).completions for runner in (recorded, launched)]
        assert texts[0] == texts[1]

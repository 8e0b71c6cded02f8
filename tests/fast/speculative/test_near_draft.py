"""A target at a stated distance from its draft: how the instrument sets the acceptance of random weights."""

from __future__ import annotations

import pytest
import torch

from llama_fast.build import build
from llama_fast.encodings.int4 import Int4
from llama_fast.engine.generate import generate
from llama_fast.plan import Plan
from llama_fast.recipes import optimised
from llama_fast.speculative.proposers import Draft
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from tests.instruments.near_draft import near

CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=101, max_context=256
)


def test_the_target_is_the_decoded_draft_and_so_much_noise() -> None:
    checkpoint = random_checkpoint(CONFIG, 3)
    small = build(checkpoint, Plan(Int4(32)), "cpu")
    same, noisy, again = near(small, 0.0), near(small, 0.2), near(small, 0.2)
    for name, decoded in small.reference_weights().items():
        assert torch.equal(same.weights[name][:], decoded)
        found = noisy.weights[name][:]
        assert torch.equal(found, again.weights[name][:]) and found.dtype is torch.float32
        off = ((found - decoded).square().mean().sqrt() / decoded.square().mean().sqrt()).item()
        assert off == pytest.approx(0.2 if decoded.ndim == 2 else 0.0, rel=0.05)


def test_noise_sets_the_acceptance() -> None:
    """Two unequal rows; a target without noise falls by rounding alone, and more noise makes more proposals fall."""
    checkpoint = random_checkpoint(CONFIG, 3)
    small = build(checkpoint, optimised(Int4(32)), "cpu")
    rates = []
    for share in (0.0, 0.1, 1.0):
        target = build(near(small, share), optimised(), "cpu")
        plain = generate(target, [[5, 17, 3], [4, 61]], 60).completions
        done = generate(target, [[5, 17, 3], [4, 61]], 60, draft=Draft(small, 3))
        assert done.completions == plain and done.speculation is not None
        rates.append(done.speculation.acceptance)
    assert rates[0] > 0.99 and rates[0] > rates[1] > rates[2]

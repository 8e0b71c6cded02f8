from __future__ import annotations

import pytest

from llama_ref.checkpoint import Checkpoint, random_checkpoint
from llama_ref.config import LlamaConfig

TINY = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=24,  # neither a power of two nor dim / n_heads
    ffn_dim=96,
    vocab_size=257,
    max_context=256,
)


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    """Weights of std 1/sqrt(columns): with smaller ones even a wrong RoPE theta would not show."""
    return random_checkpoint(TINY, seed=0)

"""Small models on which every fault shows: grouped heads, an odd head width, unequal everything."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama_ref.checkpoint import Checkpoint, random_checkpoint
from llama_ref.config import LlamaConfig

CONFIG = LlamaConfig(
    dim=48,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=10,
    ffn_dim=72,
    vocab_size=101,
    max_context=128,
    eos_ids=(7, 9),
)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    config = dataclasses.replace(CONFIG, tie_embeddings=request.param)
    return random_checkpoint(config, 3, torch.device("cpu"), torch.float32)


@pytest.fixture
def untied() -> Checkpoint:
    return random_checkpoint(CONFIG, 3, torch.device("cpu"), torch.float32)

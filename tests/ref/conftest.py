"""Checkpoints that others wrote: transformers' own tiny models, a GGUF by the gguf package, the default model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_ref.models import DEFAULT_MODEL, Model, resolve


@dataclass(frozen=True)
class Witness:
    """A directory that transformers saved, and the state dict that it saved there."""

    directory: Path
    state: dict[str, torch.Tensor]


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TINY: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "no-gqa": {"num_key_value_heads": 4, "head_dim": 8},
    "head-dim-24": {"head_dim": 24},
    "head-dim-80": {"head_dim": 80, "tie_word_embeddings": True},
    "llama3-rope": {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5000.0}},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
}

SaveTiny = Callable[..., Witness]


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory: pytest.TempPathFactory) -> SaveTiny:
    """save_tiny(max_shard_size="50GB", **config) saves a random tiny Llama (4 heads, 2 for k and v) and returns it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def save(max_shard_size: str = "50GB", **changes: Any) -> Witness:
        fields: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 101,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
        }
        model = LlamaForCausalLM(LlamaConfig(**(fields | changes)))
        directory = tmp_path_factory.mktemp("tiny")
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        return Witness(directory, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()})

    return save


@pytest.fixture(scope="session", params=list(TINY))
def witness(request: pytest.FixtureRequest, save_tiny: SaveTiny) -> Witness:
    """One of TINY, as transformers saved it."""
    return save_tiny(**TINY[request.param])


@pytest.fixture
def tiny(save_tiny: SaveTiny) -> Witness:
    """A fresh untied directory, to be damaged."""
    return save_tiny()


@pytest.fixture(scope="module")
def quiet_transformers() -> Iterator[None]:
    """transformers without its warnings of what a test does on purpose."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def default_model() -> Model:
    """The default model, through the real path: pip, checksums, the user's cache."""
    return resolve(DEFAULT_MODEL)

"""Replicas of Ray Serve on GPUs: one on each, or one that two hold together, by our kernels. Needs `llama-fast[ray]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast import Llama
from llama_fast.build import build
from llama_fast.recipes import fused
from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.tokenizer import RandomTokenizer
from tests.serve.ray_cluster import Cluster, until

CONFIG = LlamaConfig(512, 4, 8, 2, 64, 1024, 1003, 1024)
PROMPTS = ["abc" * n for n in range(1, 7)]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("shape", [{"replicas": 2}, {"ranks": 2}], ids=["a GPU each", "two GPUs together"])
def test_texts_of_replicas_are_those_of_one_gpu(shape: dict[str, int], tmp_path: Path) -> None:
    """In float32: a tie of the rounding may part two texts, but hardly one of six, and none at its first words."""
    checkpoint, tokenizer = random_checkpoint(CONFIG, 3), RandomTokenizer(1003, None, ())
    save_checkpoint(tmp_path / "model", CONFIG, dict(checkpoint.weights), tokenizer=tokenizer)
    alone = Llama(build(checkpoint, fused(), "cuda", torch.float32), tokenizer)
    expected = [str(one.text).split() for one in alone.generate(PROMPTS, 30, temperature=0)]  # type: ignore[union-attr]
    arguments: dict[str, Any] = {"model": str(tmp_path / "model"), "device": "cuda", "dtype": "float32", "fused": True}
    with Cluster(cpus=4, rows=4, **arguments, **shape) as cluster, cluster.client() as http:
        until(lambda: len(cluster.replicas()) == shape.get("replicas", 1), 300)
        found = []
        for prompt in PROMPTS:
            body = {"prompt": prompt, "max_tokens": 30, "temperature": 0}
            found.append(http.post("/v1/completions", json=body).json()["choices"][0]["text"].split())
    assert [text[:3] for text in found] == [text[:3] for text in expected]
    assert sum(a == b for a, b in zip(found, expected)) >= len(PROMPTS) - 1

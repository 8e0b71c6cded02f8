"""A server over two GPUs, by our kernels: its texts are those of one GPU, several at a time, and it ends when it is asked to."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from llama_fast import Llama
from llama_fast.build import build
from llama_fast.recipes import fused
from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.tokenizer import RandomTokenizer
from tests.parallel.launched import Launched

CONFIG = LlamaConfig(512, 4, 8, 2, 64, 1024, 1003, 1024)
NEW = 40

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def leading(one: list[str], other: list[str]) -> int:
    """How many words two texts have in common from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def test_texts_of_two_gpus_are_those_of_one(tmp_path: Path) -> None:
    """In float32. A tie of the rounding may part two texts, but hardly one text of twelve, and none at its first words."""
    checkpoint, tokenizer = random_checkpoint(CONFIG, 3), RandomTokenizer(1003, None, ())
    save_checkpoint(tmp_path / "model", CONFIG, dict(checkpoint.weights), tokenizer=tokenizer)
    alone = Llama(build(checkpoint, fused(), "cuda", torch.float32), tokenizer)
    prompts = ["abc" * n for n in range(1, 13)]
    expected = [str(one.text).split() for one in alone.generate(prompts, NEW, temperature=0)]  # type: ignore[union-attr]
    texts: dict[int, list[str]] = {}
    flags = ("--model", tmp_path / "model", "--dtype", "float32", "--fused", "--rows", 4, "--port", 0, "--name", "x")
    with Launched(2, "-m", "llama_fast", "serve", *flags) as job:
        stream = job.process.stdout
        assert stream is not None
        line = next(line for line in stream if " at http://" in line)
        with httpx.Client(base_url=line.split(" at ")[1].split(": ")[0], trust_env=False, timeout=120) as http:

            def ask(number: int) -> None:
                body: dict[str, Any] = {"prompt": prompts[number], "max_tokens": NEW, "temperature": 0}
                texts[number] = http.post("/v1/completions", json=body).json()["choices"][0]["text"].split()

            clients = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            body = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 1}
            assert http.post("/v1/completions", json=body).status_code == 200
        job.interrupt()
        code, output = job.ended()
    assert code != 0 and "interrupted" in output
    same = [leading(texts[number], expected[number]) for number in range(len(prompts))]
    assert sum(count == NEW for count in same) >= len(prompts) - 1 and min(same) > 3, same

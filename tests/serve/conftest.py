"""A tiny model with a byte-level tokenizer, served at a free port by the real server in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI

from llama_fast import Llama
from llama_fast.build import build
from llama_fast.caches.growing import Growing
from llama_fast.engine.engine import Engine
from llama_fast.engine.speculation import Speculation
from llama_fast.plan import Plan
from llama_fast.serve.app import application
from llama_fast.serve.door import Limits
from llama_fast.serve.served import Served
from llama_fast.serve.server import Address, Server, make_served
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.tokenizer import load_tokenizer

LENGTH = 2048
SPECIALS = ("<s>", "</s>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    """Its tokens are bytes and some words, so that most characters beyond ASCII are split over tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    directory = tmp_path_factory.mktemp("served")
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(vocab_size=290, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator(["the cat sat on a mat and saw dogs run home"] * 9, trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    bos, eos, _ = (backend.token_to_id(text) for text in SPECIALS)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.save(str(directory / "tokenizer.json"))
    words = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE, "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(words))
    config = LlamaConfig(48, 2, 6, 2, 10, 72, backend.get_vocab_size(), LENGTH, eos_ids=(eos,))
    return Llama(build(random_checkpoint(config, 3), Plan(cache=Growing()), "cpu"), load_tokenizer(directory))


@dataclass(frozen=True)
class Running:
    """A server that runs."""

    url: str
    served: Served
    server: Server

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def client(self, **options: Any) -> OpenAI:
        settings: dict[str, Any] = {"api_key": "any", "max_retries": 0, "base_url": f"{self.url}/v1", **options}
        return OpenAI(**settings)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with self.http as http:
            return http.post(path, json=body, **options)

    def count(self, name: str) -> float:
        found = self.served.metrics.registry.get_sample_value(f"llama_fast_{name}")
        assert found is not None, name
        return found

    def is_empty(self) -> bool:
        """Whether nothing of any request is left, in the engine or before it."""
        thread = self.served.thread
        idle = not thread.engine.busy and thread.engine.free == thread.rows
        return idle and not (thread._tickets or thread._open or thread._jobs) and thread._commands.empty()


Serve = Callable[..., contextlib.AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def serve(llama: Llama) -> Serve:
    @contextlib.contextmanager
    def running(
        rows: int = 3,
        length: int = LENGTH,
        limits: Limits = Limits(),
        api_key: str | None = None,
        draft: Speculation | None = None,
    ) -> Iterator[Running]:
        served = make_served(llama, "tiny", Engine(llama.runner, rows, length, draft=draft), limits)
        with Address(port=0).bind() as listening:
            config = uvicorn.Config(application(served, limits, api_key), log_level="warning", access_log=False)
            server = Server(config, served.thread)
            thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
            thread.start()
            try:
                until(lambda: server.started)
                yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", served, server)
            finally:
                server.should_exit = True
                thread.join(20)
                assert not thread.is_alive()

    return running


@pytest.fixture(scope="session")
def running(serve: Serve) -> Iterator[Running]:
    """One for all tests that leave it as it was."""
    with serve() as server:
        yield server
        until(server.is_empty)


def until(reached: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for it; AssertionError if it does not come."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)

"""How much of its engine's rate does a server reach, and how long do its clients wait?

    python -m tests.instruments.serving_load --model smollm2-135m --rows 8 --texts 32 --prompt-tokens 128 --new-tokens 128
    python -m tests.instruments.serving_load --model random:llama-2-7b --rows 32 --texts 128 --fused     # on a GPU

In each round the engine answers all texts by itself, in its own thread, and then as many through HTTP, to streaming clients
in another process. Prompts are random ids, different ones in every text and round, so that no prefix is known.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import uvicorn

from llama_fast import Llama
from llama_fast import recipes as presets
from llama_fast.build import build
from llama_fast.devices import default_dtype, where
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request
from llama_fast.recipes import chosen_encoding
from llama_fast.serve.app import application
from llama_fast.serve.door import Limits
from llama_fast.serve.served import Served
from llama_fast.serve.server import Address, Server, make_served, warm_up
from llama_ref.models import resolve

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
LIMITS = Limits(max_queue=4096)


@dataclass(frozen=True)
class Work:
    """So many texts of so many tokens, so many at a time."""

    texts: int
    concurrent: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self, vocabulary: int, seed: int) -> list[list[int]]:
        chance = random.Random(seed)
        return [[chance.randrange(vocabulary) for _ in range(self.prompt_tokens)] for _ in range(self.texts)]


@dataclass(frozen=True)
class Seen:
    """What clients saw."""

    tokens_per_second: float
    first: list[float]
    """Seconds until each text's first token."""
    gaps: list[float]
    """Seconds between two tokens of a text."""


class Loaded:
    """A server in this process, whose engine can also be asked directly. A context."""

    def __init__(self, llama: Llama, rows: int, length: int):
        self.served: Served = make_served(llama, "loaded", Engine(llama.runner, rows, length), LIMITS)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Loaded:
        self._stack.enter_context(self._run())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _run(self) -> Iterator[None]:
        with Address(port=0).bind() as listening:
            config = uvicorn.Config(application(self.served, LIMITS), log_level="warning", access_log=False)
            server = Server(config, self.served.thread)
            self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            self.loop = asyncio.new_event_loop()
            thread = threading.Thread(target=lambda: self.loop.run_until_complete(server.serve([listening])))
            thread.start()
            while not server.started:
                time.sleep(0.01)
            try:
                yield
            finally:
                server.should_exit = True
                thread.join()
                self.loop.close()

    def in_thread(self, job: Callable[[], T]) -> T:
        """What a job returns that runs in the engine's thread."""
        return asyncio.run_coroutine_threadsafe(self.served.thread.run(job), self.loop).result()

    def alone(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Tokens/s of the engine by itself."""
        engine = self.served.thread.engine

        def answer() -> float:
            began, tokens = time.perf_counter(), 0
            for ids in prompts:
                engine.add(Request(ids, new_tokens))
            while engine.busy:
                tokens += len(engine.step())
            return tokens / (time.perf_counter() - began)

        return self.in_thread(answer)

    def under_load(self, prompts: Sequence[Sequence[int]], work: Work) -> Seen:
        """Tokens/s of the server, and what its clients wait for."""
        body = {"max_tokens": work.new_tokens, "temperature": 0, "ignore_eos": True}
        asked = {
            "url": self.url,
            "concurrent": work.concurrent,
            "bodies": [{**body, "prompt": ids} for ids in prompts],
        }
        command = [sys.executable, "-m", "tests.instruments.streaming_client"]
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True, cwd=ROOT)
        found = json.loads(done.stdout)
        texts = found["texts"]
        assert [one["tokens"] for one in texts] == [work.new_tokens] * work.texts
        gaps = [b - a for one in texts for a, b in zip(one["times"], one["times"][1:])]
        rate = work.texts * work.new_tokens / found["seconds"]
        return Seen(rate, [one["times"][0] for one in texts], gaps)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that so large a share does not exceed: ([1, 2, 3], 0.5) -> 2."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device")
    parser.add_argument("--encoding")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--concurrent", type=int, help="as many as there are rows, by default")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    to, found = where(given.device), resolve(given.model)
    checkpoint = found.open(to, default_dtype(to))
    kept = chosen_encoding(given.encoding, checkpoint, given.fused)
    plan = presets.fused(kept) if given.fused else presets.optimised(kept, given.compile)
    llama = Llama(build(checkpoint, plan, to), found.tokenizer())
    work = Work(given.texts, given.concurrent or given.rows, given.prompt_tokens, given.new_tokens)
    with Loaded(llama, given.rows, work.prompt_tokens + work.new_tokens) as loaded:
        loaded.in_thread(lambda: warm_up(loaded.served.thread.engine))
        vocabulary = llama.runner.config.vocab_size
        warm = replace(work, texts=work.concurrent)
        loaded.under_load(warm.prompts(vocabulary, 0), warm)
        ratios = []
        for number in range(given.rounds):
            alone = loaded.alone(work.prompts(vocabulary, 2 * number + 1), work.new_tokens)
            seen = loaded.under_load(work.prompts(vocabulary, 2 * number + 2), work)
            ratios.append(seen.tokens_per_second / alone)
            waits = [
                f"{name} {quantile(values, 0.5) * 1000:.1f} / {quantile(values, 0.99) * 1000:.1f} ms"
                for name, values in (("first token p50 / p99", seen.first), ("gap p50 / p99", seen.gaps))
            ]
            rates = f"engine {alone:.1f}, server {seen.tokens_per_second:.1f} tokens/s ({ratios[-1]:.3f})"
            print(f"{rates}; {'; '.join(waits)}", flush=True)
        print(f"ratio: {median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")


if __name__ == "__main__":
    main()

"""What do the server's two threads spend on a token, when the model costs nothing?

    python -m tests.instruments.serving_cost --texts 32 --new-tokens 128 --step-ms 6 [--profile]

Streaming clients in another process ask for as many texts at once. The model computes nothing and takes so many milliseconds a
step, as a GPU that is waited for; its tokenizer is the default model's. (Without a pause the engine is ahead of the event loop,
which then sends several tokens at once.) Told are microseconds of each thread's own time a token: what else the machine does is
not counted. Both threads hold Python's lock while they work, so that their sum bounds the tokens/s of a server, whatever its GPU
could do. --profile: where the event loop's time goes.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llama_fast import Llama
from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.plan import Plan
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.models import resolve
from tests.instruments.serving_load import Loaded, Work

PROMPT = 16


def counting(vocabulary: int, seconds: float) -> Any:
    """A runner that continues every row with the next id, and takes so long for a step."""
    config = LlamaConfig(16, 1, 2, 1, 8, 16, vocabulary, 4096)
    runner = build(random_checkpoint(config, 0), Plan(cache=Static()), "cpu")
    logits_11V = torch.zeros(1, 1, vocabulary)

    def read(model: Any, tokens_BT: Tensor, where: Any, cache: Any, choose: Any) -> tuple[Tensor, Tensor]:
        return (tokens_BT[:, -1] + 1) % vocabulary, logits_11V[:, 0].expand(len(tokens_BT), -1)

    def step(model: Any, tokens_BT: Tensor, where: Any, cache: Any, choose: Any) -> tuple[Tensor, Tensor]:
        time.sleep(seconds)
        return (tokens_BT[:, -1] + 1) % vocabulary, logits_11V.expand(len(tokens_BT), -1, -1)

    return replace(runner, run_prefill=read, run_decode=step)


class Watch:
    """The own time of the event loop's thread and of the engine's."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded

    def seconds(self) -> tuple[float, float]:
        async def here() -> float:
            return time.thread_time()

        loop = asyncio.run_coroutine_threadsafe(here(), self.loaded.loop).result()
        return loop, self.loaded.in_thread(time.thread_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=6.0)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    tokenizer = resolve("smollm2-135m").tokenizer()
    llama = Llama(counting(49152, given.step_ms / 1000), tokenizer)
    work = Work(given.texts, given.texts, PROMPT, given.new_tokens)
    with Loaded(llama, given.texts, PROMPT + given.new_tokens) as loaded:
        watch, profiler = Watch(loaded), cProfile.Profile()
        loaded.under_load(work.prompts(40000, 0), work)
        if given.profile:
            loaded.loop.call_soon_threadsafe(profiler.enable)
        for number in range(given.rounds):
            before = watch.seconds()
            loaded.under_load(work.prompts(40000, number + 1), work)
            loop, engine = (
                (b - a) / (given.texts * given.new_tokens) * 1e6 for a, b in zip(before, watch.seconds(), strict=True)
            )
            both = 1e6 / (loop + engine)
            print(f"event loop {loop:.1f} us a token, engine {engine:.1f}: at most {both:.0f} tokens/s", flush=True)
        if given.profile:
            loaded.loop.call_soon_threadsafe(profiler.disable)
            time.sleep(0.1)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    main()

"""How much more do two replicas on Ray Serve answer than one server without Ray, and what does the way through Ray cost?

    python -m tests.instruments.replicas --model smollm2-135m --rows 8 --texts 16 --prompt-tokens 64 --new-tokens 32

`llama-fast serve` and a cluster of two replicas stand side by side, each engine on one core. In each round the same streaming
clients, in a process of their own, ask the one and then the other. Prompts are random ids below 256. Beside tokens/s a line tells
the processor time of a token: in the replicas, and in what stands before them (Ray's proxy and our gateway), which depends less
on who else uses the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from tests.instruments.serving_load import ROOT, Work, quantile
from tests.serve.ray_cluster import Cluster, until, words_of


@dataclass(frozen=True)
class Seen:
    """One round at one cluster."""

    tokens_per_second: float
    first: float
    """Median seconds to the first token."""
    before: float
    """Processor milliseconds of a token in the proxy and the gateway."""
    replicas: float
    """And in the replicas."""


def processor_seconds(cluster: Cluster, *names: str) -> float:
    """Of all processes whose command has one of these names."""
    return sum(
        sum(process.cpu_times()[:2])
        for process in cluster.processes()
        if any(name in word for name in names for word in words_of(process))
    )


def under_load(url: str, cluster: Cluster, work: Work, seed: int) -> Seen:
    """Ask for all texts at `url`, and see what the cluster's processes do meanwhile."""
    body = {"max_tokens": work.new_tokens, "temperature": 0, "ignore_eos": True}
    bodies = [{**body, "prompt": ids} for ids in work.prompts(256, seed)]
    asked = json.dumps({"url": url, "concurrent": work.concurrent, "bodies": bodies})
    places = (("ProxyActor", ":Gateway"), (":Replica",))
    began = [processor_seconds(cluster, *names) for names in places]
    command = [sys.executable, "-m", "tests.instruments.streaming_client"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True, cwd=ROOT)
    spent = [processor_seconds(cluster, *names) - before for names, before in zip(places, began)]
    found, tokens = json.loads(done.stdout), work.texts * work.new_tokens
    assert [one["tokens"] for one in found["texts"]] == [work.new_tokens] * work.texts
    first = quantile([one["times"][0] for one in found["texts"]], 0.5)
    return Seen(tokens / found["seconds"], first, *(1000 * seconds / tokens for seconds in spent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    work = Work(given.texts, 2 * given.rows, given.prompt_tokens, given.new_tokens)
    arguments = {"model": given.model, "rows": given.rows, "length": given.prompt_tokens + given.new_tokens}
    with one_server(arguments) as alone, Cluster(2, replicas=2, **arguments) as two:
        until(lambda: len(two.replicas()) == 2, 300)
        for url in (alone, two.url):
            under_load(url, two, work, 0)
        ratios = []
        for number in range(1, given.rounds + 1):
            one, both = (under_load(url, two, work, number) for url in (alone, two.url))
            ratios.append(both.tokens_per_second / one.tokens_per_second)
            print(
                f"one server {one.tokens_per_second:.1f}, two replicas {both.tokens_per_second:.1f} tokens/s ({ratios[-1]:.2f}); "
                f"first token {one.first:.2f} and {both.first:.2f} s; "
                f"a token: {both.before:.2f} ms before the replicas, {both.replicas:.2f} in them",
                flush=True,
            )
        print(f"ratio: {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


@contextlib.contextmanager
def one_server(arguments: dict[str, Any]) -> Iterator[str]:
    """`llama-fast serve` on one core; its address."""
    flags = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "llama_fast", "serve", "--device", "cpu", "--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split(" at ")[1].split(": ")[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


if __name__ == "__main__":
    main()

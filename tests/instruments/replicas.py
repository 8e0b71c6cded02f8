"""How much more do two replicas on Ray Serve answer than one, and what does the way through Ray cost?

    python -m tests.instruments.replicas --model smollm2-135m --rows 8 --texts 16 --prompt-tokens 64 --new-tokens 64

Two clusters stand side by side, with one replica and with two, each replica on one core. In each round the same streaming
clients, in a process of their own, ask the one and then the other. Prompts are random ids below 256. Beside tokens/s a line tells
the processor time of a token: in the replicas, and in what stands before them (Ray's proxy and our gateway), which depends less
on who else uses the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from statistics import median

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


def under_load(cluster: Cluster, work: Work, seed: int) -> Seen:
    """Ask for all texts."""
    body = {"max_tokens": work.new_tokens, "temperature": 0, "ignore_eos": True}
    bodies = [{**body, "prompt": ids} for ids in work.prompts(256, seed)]
    asked = json.dumps({"url": cluster.url, "concurrent": work.concurrent, "bodies": bodies})
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
    with Cluster(1, replicas=1, **arguments) as one, Cluster(2, replicas=2, **arguments) as two:
        until(lambda: len(two.replicas()) == 2, 300)
        for cluster in (one, two):
            under_load(cluster, work, 0)
        ratios = []
        for number in range(1, given.rounds + 1):
            seen = [under_load(cluster, work, number) for cluster in (one, two)]
            ratios.append(seen[1].tokens_per_second / seen[0].tokens_per_second)
            rates = ", ".join(f"{one.tokens_per_second:.1f}" for one in seen)
            spent = "; ".join(f"{one.before:.2f} ms before the replicas, {one.replicas:.2f} in them" for one in seen)
            firsts = ", ".join(f"{one.first:.2f}" for one in seen)
            print(
                f"one and two replicas: {rates} tokens/s ({ratios[-1]:.2f}); first token {firsts} s; a token: {spent}",
                flush=True,
            )
        print(f"ratio: {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()

"""Two replicas on Ray Serve that are killed, left by their clients, and asked ten thousand times: `tox -e ray`."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from llama_fast import Llama
from tests.serve.ray_cluster import Cluster, tiny_model, until
from tests.serve.replica_clients import PROMPTS, Seen, visit
from tests.serve.test_leaving import ENDLESS, PATH, Leaver

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3600)]
KILLS = int(os.environ.get("LLAMA_FAST_KILLS", "20"))
REQUESTS = int(os.environ.get("LLAMA_FAST_REQUESTS", "10000"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("replicas") / "model")


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    with Cluster(model=str(model), replicas=2, rows=4, length=4096, max_queue=64) as running:
        until(lambda: len(running.replicas()) == 2, 120)
        yield running


def generated(cluster: Cluster) -> float:
    return cluster.count("generated_tokens_total")


def test_twenty_replicas_are_killed_and_nothing_is_lost_that_had_streamed_nothing(
    cluster: Cluster, model: Path
) -> None:
    """Every other client is told, in an event; texts are right; and each time the replica comes back."""
    tokens, llama = 300, Llama.from_pretrained(model, device="cpu")
    expected = {prompt: llama.generate(prompt, tokens).text for prompt in PROMPTS}
    seen, stop, chance = Seen(expected), asyncio.Event(), random.Random(5)
    back: list[float] = []

    async def load() -> None:
        await asyncio.gather(*(visit(cluster.url, seen, tokens, seed, stop) for seed in range(10)))

    loop = asyncio.new_event_loop()
    clients = threading.Thread(target=lambda: loop.run_until_complete(load()))
    clients.start()
    try:
        for _ in range(KILLS):
            time.sleep(1 + 2 * chance.random())
            victims = cluster.replica_processes()
            before = cluster.replicas()
            assert len(victims) == len(before) == 2
            chance.choice(victims).kill()
            began = time.monotonic()
            until(lambda: len(now := cluster.replicas()) == 2 and now != before, 180)  # noqa: B023 - called at once
            back.append(time.monotonic() - began)
    finally:
        loop.call_soon_threadsafe(stop.set)
        clients.join()
        loop.close()
    again, lost = cluster.count("gateway_asked_again_total"), cluster.count("gateway_lost_total")
    print(
        f"\n{dict(seen.outcomes)}; asked again {again:.0f}, told {lost:.0f}; back after {min(back):.1f} to {max(back):.1f} s"
    )
    assert not seen.wrong, seen.wrong[:5]
    assert again > 0 and lost == seen.outcomes["stream told"] > 0


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_hangs_up_frees_its_rows_in_the_replica(cluster: Cluster, stream: bool) -> None:
    before, cancelled = generated(cluster), cluster.count("cancelled_rows_total")
    client = Leaver(cluster, {**ENDLESS, "max_tokens": 4000, "stream": stream, "n": 2})  # type: ignore[arg-type]
    until(lambda: generated(cluster) > before + 20)
    assert cluster.count("rows_in_use") == 2
    client.leave()
    until(lambda: cluster.count("rows_in_use") == 0, 20)
    assert generated(cluster) - before < 7000
    assert cluster.count("cancelled_rows_total") - cancelled == 2


def test_more_requests_than_rows_and_queue_hold_are_refused_and_the_others_answered(cluster: Cluster) -> None:
    body = {"prompt": "the cat", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    statuses: list[int] = []

    async def ask() -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=300, trust_env=False, limits=httpx.Limits()) as http:
            answers = await asyncio.gather(*(http.post(PATH, json=body) for _ in range(110)))
        for answer in answers:
            statuses.append(answer.status_code)
            assert answer.status_code == 200 or answer.json()["error"]["code"] == "queue_full"

    asyncio.run(ask())
    assert set(statuses) == {200, 429} and statuses.count(200) >= 2 * (4 + 2) + 64 - 8


def test_memory_is_flat_over_ten_thousand_requests(cluster: Cluster) -> None:
    """Of the replicas, the gateway and Ray's proxy: after the first fifth each stays within some megabytes."""
    held: list[dict[int, float]] = []
    names = ("ServeReplica", "ProxyActor")

    def resident() -> dict[int, float]:
        found = {}
        for process in cluster.processes():
            if any(name in " ".join(process.cmdline()) for name in names):
                found[process.pid] = process.memory_info().rss / 1e6
        return found

    async def ask(count: int, seed: int) -> None:
        chance = random.Random(seed)
        async with httpx.AsyncClient(base_url=cluster.url, timeout=300, trust_env=False) as http:
            for _ in range(count):
                words = {"prompt": [chance.randrange(259) for _ in range(chance.randint(1, 40))]}
                body: dict[str, Any] = {**words, "max_tokens": chance.randint(1, 8), "stream": chance.random() < 0.5}
                answer = await http.post(PATH, json=body)
                assert answer.status_code == 200, answer.text

    async def stretch(number: int) -> None:
        await asyncio.gather(*(ask(REQUESTS // 10 // 8, 8 * number + seed) for seed in range(8)))

    for number in range(10):
        began = time.monotonic()
        asyncio.run(stretch(number))
        held.append(resident())
        rate = REQUESTS / 10 / (time.monotonic() - began)
        print(
            f"{(number + 1) * REQUESTS // 10:6} requests: {[round(v, 1) for v in held[-1].values()]} MB, {rate:.0f}/s",
            flush=True,
        )
    assert all(one.keys() == held[0].keys() for one in held) and len(held[0]) == 4
    grown = {psutil.Process(pid).name(): held[-1][pid] - held[1][pid] for pid in held[0]}
    assert max(grown.values()) < 25, grown

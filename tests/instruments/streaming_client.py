"""Clients that stream answers, in a process of their own, so that reading them costs the server nothing.

Standard input: {"url": ..., "concurrent": 8, "bodies": [...]}. Standard output: {"seconds": ..., "texts": [...]}, where a text is
{"tokens": ..., "times": [...]} with the times of its events in seconds since it was asked for.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx


async def text(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """Ask for one text; when its events came, and how many tokens it has."""
    began, times, tokens = time.perf_counter(), [], 0
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if line.endswith(',"usage":null}'):
                times.append(time.perf_counter() - began)
            else:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    return {"tokens": tokens, "times": times}


async def work(client: httpx.AsyncClient, bodies: Iterator[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    for body in bodies:
        found.append(await text(client, body))


async def load(url: str, concurrent: int, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """All texts, so many at a time."""
    found: list[dict[str, Any]] = []
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        began, left = time.perf_counter(), iter(bodies)
        await asyncio.gather(*(work(client, left, found) for _ in range(concurrent)))
        return {"seconds": time.perf_counter() - began, "texts": found}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(**json.load(sys.stdin)))))

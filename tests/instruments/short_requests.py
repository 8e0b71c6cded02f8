"""Short requests of all kinds to a server of `serving_soak`: `python -m tests.instruments.short_requests URL COUNT SEED`."""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

import httpx

CLIENTS = 6
STATUS = {200, 400}


def body(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body; one in eight is refused."""
    common = {
        "max_tokens": chance.randint(1, 8),
        "temperature": chance.choice([0, 0.9]),
        "stream": chance.random() < 0.5,
    }
    if chance.random() < 0.125:
        common[chance.choice(["wrong", "suffix"])] = "x" * chance.randint(1, 50)
    words = " ".join(chance.choice(["abc", "de", "f"]) for _ in range(chance.randint(1, 20)))
    if chance.random() < 0.3:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": words}], **common}
    extra = chance.choice([{}, {"logprobs": 2}, {"n": 2}, {"stop": ["12", "7"]}, {"echo": True, "logprobs": 1}])
    return "/v1/completions", {"prompt": words, **common, **extra}


async def visit(client: httpx.AsyncClient, count: int, chance: random.Random) -> None:
    for _ in range(count):
        path, asked = body(chance)
        if chance.random() < 0.05:  # somebody who does not wait
            asked["max_tokens"] = 200
            try:
                await client.post(path, json=asked, timeout=0.02)
            except httpx.TimeoutException:
                continue
            continue
        answer = await client.post(path, json=asked)
        assert answer.status_code in STATUS, answer.text


async def main(url: str, count: int, seed: int) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        shares = [count // CLIENTS + (i < count % CLIENTS) for i in range(CLIENTS)]
        await asyncio.gather(*(visit(client, share, random.Random(f"{seed}/{i}")) for i, share in enumerate(shares)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))

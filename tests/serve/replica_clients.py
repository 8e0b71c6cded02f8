"""Clients of a service whose replicas are killed: each request is whole and right, or its client was told, or it is lost."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

PROMPTS = ("the cat", "a mat and", "dogs run home, and the cat", "é€")
WHOLE, TOLD, SILENT = "whole", "told", "silent"


@dataclass
class Seen:
    """What became of all requests."""

    expected: Mapping[str, str]
    """The text of each prompt."""
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What must not be: a request lost that had streamed nothing, a stream that was cut without a word, another text."""

    def note(self, kind: str, prompt: str, text: str, error: Any, ended: bool) -> None:
        """One request's end: its text, the error it was told, whether its end was there."""
        if error is not None:
            told_late = kind == "stream" and text and error.get("code") == "replica_lost"
            if not told_late or not self.expected[prompt].startswith(text):
                self.wrong.append(f"{kind} {prompt!r}: after {text!r:.60} told {error}")
            self.outcomes[f"{kind} {TOLD}"] += 1
        elif not ended:
            self.wrong.append(f"{kind} {prompt!r}: ended without a word after {text!r:.60}")
            self.outcomes[f"{kind} {SILENT}"] += 1
        else:
            if text != self.expected[prompt]:
                self.wrong.append(f"{kind} {prompt!r}: another text, {text!r:.60}")
            self.outcomes[f"{kind} {WHOLE}"] += 1


async def whole(http: httpx.AsyncClient, body: dict[str, Any], seen: Seen) -> None:
    """One request for a whole answer."""
    try:
        response = await http.post("/v1/completions", json=body)
        told = response.json()
    except (httpx.HTTPError, ValueError) as error:
        seen.note("whole", body["prompt"], "", {"message": repr(error)}, False)
        return
    text = told["choices"][0]["text"] if "choices" in told else ""
    seen.note("whole", body["prompt"], text, told.get("error"), True)


async def streamed(http: httpx.AsyncClient, body: dict[str, Any], seen: Seen) -> None:
    """One request for a stream."""
    text, error, ended = "", None, False
    try:
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            if response.status_code != 200:
                error = json.loads(await response.aread()).get("error")
            else:
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        ended = True
                    elif line.startswith("data: "):
                        chunk = json.loads(line[6:])
                        error = chunk.get("error", error)
                        text += chunk["choices"][0]["text"] if "choices" in chunk else ""
    except (httpx.HTTPError, ValueError) as failure:
        error = {"message": repr(failure)}
    seen.note("stream", body["prompt"], text, error, ended)


async def visit(url: str, seen: Seen, tokens: int, seed: int, stop: asyncio.Event) -> None:
    """One client's requests, streamed and whole, until it is to stop."""
    chance = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as http:
        while not stop.is_set():
            prompt = chance.choice(PROMPTS)
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
            await (streamed if chance.random() < 0.5 else whole)(http, body, seen)

"""A replica: the server's application with its engine, in a process of Ray's, asked by gateways instead of by a socket."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI
from prometheus_client import Metric
from ray import serve

from llama_fast.engine.engine import Engine
from llama_fast.parallel import ranks
from llama_fast.serve.app import application
from llama_fast.serve.door import Limits
from llama_fast.serve.errors import ApiError
from llama_fast.serve.memory import bound_prepared_products
from llama_fast.serve.metrics import labelled
from llama_fast.serve.ray.calls import END, Call, Head, Piece
from llama_fast.serve.ray.group import Group, Share
from llama_fast.serve.served import Served
from llama_fast.serve.server import make_served, warm_up
from llama_fast.serve.setup import Setup

Message = MutableMapping[str, Any]


@dataclass(frozen=True)
class Serving:
    """What every replica is."""

    setup: Setup
    name: str
    limits: Limits
    size: int
    """Ranks that hold the model together."""
    share: Share
    """What of a machine each rank has."""


class Replica:
    """The deployment behind the gateways. Ray starts another one where a replica is lost, or says that it is not healthy."""

    async def __init__(self, serving: Serving):  # type: ignore[misc]  # Ray awaits it
        self.id = serve.get_replica_context().replica_id.unique_id
        torch.set_num_threads(serving.share.cpus)
        bound_prepared_products()
        group = await Group.gathered(serving.setup, serving.size, serving.share)
        group.follow(end)
        self.served = await asyncio.to_thread(opened, serving, group)
        self.app: FastAPI = application(self.served, serving.limits)
        self.served.thread.on_failure = lambda: end(f"the engine has failed: {self.served.thread.failure}")
        self.served.thread.start()

    async def answer(self, call: Call) -> AsyncGenerator[Piece, None]:
        """The answer to a request: its head, its body in pieces as they come, END. If it is cancelled, so are its rows."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        body: Message | None = {"type": "http.request", "body": call.body, "more_body": False}

        async def receive() -> Message:
            nonlocal body
            given, body = body, None
            if given is None:
                await asyncio.Event().wait()  # a client that leaves is a call that is cancelled
            assert given is not None
            return given

        async def send(message: Message) -> None:
            messages.put_nowait(message)

        work = asyncio.ensure_future(self.app(call.scope, receive, send))
        work.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield Head(message["status"], list(message["headers"]))
                    continue
                pieces = [message.get("body", b"")]
                while not messages.empty():  # what has come meanwhile goes in one piece
                    message = messages.get_nowait()
                    if message is None:
                        messages.put_nowait(None)
                        break
                    pieces.append(message.get("body", b""))
                yield b"".join(pieces)
            yield END
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def metrics(self) -> Sequence[Metric]:
        """What /metrics tells of this replica."""
        return labelled(self.served.metrics.registry, replica=self.id)

    async def is_open(self) -> bool:
        """Whether requests are taken."""
        try:
            self.served.thread.check_open()
        except ApiError:
            return False
        return True

    async def check_health(self) -> None:
        """RuntimeError, on which Ray replaces this replica, if requests are not taken."""
        if not await self.is_open():
            raise RuntimeError("this replica takes no requests any more")


def opened(serving: Serving, group: Group) -> Served:
    """The model, and the engine that answers: alone, or leading the group's other ranks."""
    member = group.join()
    llama, slots = serving.setup.opened(member)
    if member.watch is None:
        engine = Engine(llama.runner, **slots)
    else:
        from llama_fast.parallel.orders import Orders
        from llama_fast.serve.following import LeadingEngine

        engine = LeadingEngine(Orders(), llama, **slots)
    served = make_served(llama, serving.name, engine, serving.limits)
    if serving.setup.warms_up:
        warm_up(engine)
    return served


def end(reason: str) -> None:
    """End this process at once, and say why: its requests are then asked again or told, as those of any lost replica."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    ranks.hard_exit(2)

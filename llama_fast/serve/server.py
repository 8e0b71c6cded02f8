"""The process that serves: a socket, uvicorn's loop, and an end within seconds."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request
from llama_fast.llama import Llama
from llama_fast.serve.app import application
from llama_fast.serve.door import Limits
from llama_fast.serve.engine_thread import EngineThread
from llama_fast.serve.metrics import Metrics
from llama_fast.serve.served import Served

GRACE_SECONDS = 3.0
"""What runs may take so long to finish after Ctrl-C; then its clients are told that it ends."""
CUT_SECONDS = 4
"""After so long uvicorn cuts connections that are still open."""


@dataclass(frozen=True)
class Address:
    """Where to listen. Port 0 is any free one."""

    host: str = "127.0.0.1"
    port: int = 8000

    def bind(self) -> socket.socket:
        """A socket that listens there; OSError, in one line, if that cannot be."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            return socket.create_server(found[0][4][:2], family=found[0][0])
        except (OSError, OverflowError) as error:
            raise OSError(f"cannot listen at {self.host}:{self.port}: {error}") from None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Server(uvicorn.Server):
    """uvicorn, which tells clients of unfinished answers before it ends."""

    def __init__(self, config: uvicorn.Config, thread: EngineThread):
        super().__init__(config)
        self._thread = thread
        thread.on_failure = self.leave
        self.signal: int | None = None
        """The first signal that asked it to end."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signal = self.signal or sig
        super().handle_exit(sig, frame)

    def leave(self) -> None:
        """End as if it had been asked to."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end = asyncio.create_task(self._thread.finish(GRACE_SECONDS))
        await super().shutdown(sockets)
        end.cancel()


def make_served(llama: Llama, name: str, engine: Engine, limits: Limits = Limits()) -> Served:
    """A model under a name, and the engine that answers."""
    metrics = Metrics()
    return Served(llama, name, EngineThread(engine, metrics, limits.max_queue, limits.timeout), metrics)


def warm_up(engine: Engine) -> None:
    """Compile, or record, what the first requests would otherwise wait for: with a draft, rounds of every number of rows."""
    rows, counts = len(engine.slots), [1]
    if engine.draft is not None:
        counts = sorted({rows, *(1 << n for n in range(rows.bit_length()))})
    for count in counts:
        for _ in range(count):
            engine.add(Request([0, 0], min(8, engine.length - 2)))
        while engine.busy:
            engine.step()


def run_server(served: Served, address: Address, limits: Limits, api_key: str | None) -> int | None:
    """Serve until Ctrl-C (KeyboardInterrupt, unless it is handled) or SIGTERM: the signal. RuntimeError if the engine fails."""
    with address.bind() as listening:
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        if not address.is_loopback and api_key is None:
            print(f"warning: {host} can be reached by others, and there is no --api-key", file=sys.stderr, flush=True)
        settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
        app = application(served, limits, api_key)
        config = uvicorn.Config(app, timeout_graceful_shutdown=CUT_SECONDS, **settings)
        print(
            f"{served.name} at http://{shown}:{port}: {served.thread.rows} rows of {served.length} positions",
            flush=True,
        )
        server = Server(config, served.thread)
        server.run(sockets=[listening])
    if served.thread.failure is not None:
        raise RuntimeError(f"the engine has failed: {served.thread.failure}")
    return server.signal

"""What stands before every endpoint: the API key, the limits of a body, and the count of answers. A pure ASGI middleware.

(Starlette's BaseHTTPMiddleware would hide from the endpoints that a client has left.)
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from llama_fast.serve.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = ("/", "/health")
"""Paths that need no key: the page, which asks for it, and the health check."""


@dataclass(frozen=True)
class Limits:
    """What one client may ask of the server."""

    max_body: int = 4_000_000
    """Bytes of a body."""
    timeout: float = 600.0
    """Seconds that a request may take, waiting included; and that its body may take to arrive."""
    max_queue: int = 64
    """Rows that may wait for a slot."""


def check_key(name: str, key: str | None) -> None:
    """ValueError, by the argument's name, for an API key that no header can carry."""
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise ValueError(f"{name} must be printable ASCII, and not empty")


class Counted(Protocol):
    """Where answers are counted."""

    requests: Counter
    """By path and status."""


class Door:
    """The middleware."""

    def __init__(self, app: Any, metrics: Counted, limits: Limits, api_key: str | None, paths: frozenset[str]):
        self.app, self.metrics, self.limits, self.api_key, self.paths = app, metrics, limits, api_key, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            response = JSONResponse(refusal.body, refusal.status, headers=refusal.headers)
            await response(scope, receive, counted)
            return
        await self.app(scope, self._limited(receive), counted)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self.api_key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
                return ApiError(
                    401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key"
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:18]) > self.limits.max_body:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body exceeds {self.limits.max_body} bytes", code="body_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, which refuses a body that is too large or too slow, whatever its header said."""
        end, size, complete = time.monotonic() + self.limits.timeout, 0, False

        async def limited() -> MutableMapping[str, Any]:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self.limits.timeout:g} s") from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if size > self.limits.max_body:
                    raise HTTPException(413, self._too_large().message)
            return message

        return limited

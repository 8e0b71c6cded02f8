"""What goes between a gateway and a replica: a request, and its answer in pieces."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """An HTTP request. Of its headers only the content type: the key was asked for at the door."""

    method: str
    path: str
    query: bytes
    content_type: bytes
    body: bytes
    prompt: str
    """What Ray's prefix-aware placement compares: never empty, because it divides by the length."""

    @property
    def scope(self) -> dict[str, Any]:
        """The ASGI scope of the request."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": [(b"content-type", self.content_type), (b"content-length", str(len(self.body)).encode())],
            "client": None,
            "server": None,
        }


@dataclass(frozen=True)
class Head:
    """The first piece of an answer; bytes follow, and at last END: without it the answer is not whole."""

    status: int
    headers: list[tuple[bytes, bytes]]

    @property
    def is_stream(self) -> bool:
        """Whether the body is events, told as they come."""
        return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in self.headers)


END = None
Piece = Head | bytes | None


def beginning(path: str, body: bytes) -> str:
    """The text that a request's model reads first, as far as JSON tells; else the path.

    Token ids become one character each: [1, 2] -> "\\x01\\x02". Of several prompts the first counts.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return path
    if not isinstance(asked, dict):
        return path
    messages, prompt = asked.get("messages"), asked.get("prompt")
    if isinstance(messages, list):
        return "".join(json.dumps(message, ensure_ascii=False) for message in messages) or path
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list):
        return "".join(spelled(one) for one in prompt if isinstance(one, int)) or path
    return prompt if isinstance(prompt, str) and prompt else path


def spelled(id: int) -> str:
    """One character for a token id, the same for the same one; surrogates are no characters and left out."""
    return chr((id if id < 0xD800 else id + 0x800) % 0x110000)

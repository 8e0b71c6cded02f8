"""What a client is told when a request is refused: OpenAI's error body, with the field that is to blame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
"""OpenAI's `type` of each status; other refusals are an "invalid_request_error"."""


class ApiError(Exception):
    """A refusal: its status, one sentence for the client, and the field of the body that caused it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}"""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to try again: soon if the queue is full; never by itself if this request takes too long."""
        if self.status in (429, 503):
            return {"retry-after": "1"}
        if self.status == 408:
            return {"x-should-retry": "false"}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}


def refused(field: str, message: str) -> ApiError:
    """A 400 that names the field: refused("n", "must be positive") -> "n: must be positive"."""
    return ApiError(400, f"{field}: {message}", field)


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The 400 for a body that does not have the right form; `errors` are Pydantic's. The first field is named."""
    first = errors[0]
    where = [part for part in first.get("loc", ()) if part not in ("body", "query")]
    if first.get("type") == "json_invalid" or not where:
        wrong = first.get("type") == "json_invalid"
        return ApiError(400, "the body is not JSON" if wrong else "the body must be a JSON object: application/json")
    field = str(where[0])
    if first.get("type") == "extra_forbidden" and len(where) == 1:
        return ApiError(400, f"{field}: this server does not know this field", field, "unknown_parameter")
    if field == "prompt" and first.get("type") != "missing":
        forms = "text, a list of texts, token ids, or a list of lists of token ids; none of them empty, at most 128"
        return ApiError(400, f"prompt: it must be {forms}", field)
    said = dict.fromkeys(str(one["msg"]) for one in errors if field in map(str, one.get("loc", ())))
    place = next((f"[{part}]" for part in where[1:] if isinstance(part, int)), "")
    inner = [part for part in where[1:] if isinstance(part, str) and part.isidentifier()]
    place += "".join(f".{part}" for part in inner[-1:] if field in ("messages", "stream_options", "response_format"))
    return ApiError(400, f"{field}{place}: {'; or '.join(list(said)[:4])}", field)

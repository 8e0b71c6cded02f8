"""How the numbers of a model are taken out of a file that states them: present, whole, and named when they are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def required(data: Mapping[str, Any], name: str) -> Any:
    """A number that the file must state."""
    value = data.get(name)
    if value is None:
        raise ValueError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} must be a number")
    return value


def stated(value: Any, default: Any) -> Any:
    """The value, or the default where there is none."""
    return default if value is None else value


def even_share(total: int, parts: int, total_name: str, parts_name: str) -> int:
    """The width of a head where only all heads together have one."""
    if parts <= 0 or total % parts:
        raise ValueError(f"{total_name}={total} does not divide over {parts_name}={parts}, and no head_dim is given")
    return total // parts


def as_ids(value: Any) -> tuple[int, ...]:
    """Token ids as files spell them, each once: None -> (), 2 -> (2,), [2, 7, 2] -> (2, 7)."""
    if value is None:
        return ()
    ids = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"eos_token_id={value!r} must be a token id or a list of them")
    return tuple(dict.fromkeys(ids))

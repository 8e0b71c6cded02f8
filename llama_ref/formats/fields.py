"""How the numbers of a model are taken out of a file that states them: present, of the right kind, and named when not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def whole(data: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A count: a positive whole number. `null` is as good as absent; without a default the file must state it."""
    value = data.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{name} is missing")
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r:.80} must be a number")
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}={value!r:.80} must be a positive whole number")
    return value


def number(data: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A finite number, also one in quotes, as "1e-05" in files that were YAML once. `null` is as good as absent."""
    value = data.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{name} is missing")
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{name}={value!r:.80} must be a number")
    return found


def flag(data: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false, and nothing that merely counts as either: "false" in quotes would count as true."""
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r:.80} must be true or false")
    return default if value is None else value


def word(data: Mapping[str, Any], name: str, default: str) -> str:
    """A text, in small letters. `null` is as good as absent."""
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}={value!r:.80} must be a text")
    return default if value is None else value.lower()


def stated(value: Any, default: Any) -> Any:
    """The value, or the default where there is none."""
    return default if value is None else value


def even_share(total: int, parts: int, total_name: str, parts_name: str) -> int:
    """The width of a head where only all heads together have one."""
    if parts <= 0 or total % parts:
        raise ValueError(f"{total_name}={total} does not divide over {parts_name}={parts}, and no head_dim is given")
    return total // parts


def as_ids(value: Any, name: str = "eos_token_id") -> tuple[int, ...]:
    """Token ids as files spell them, each once: None -> (), 2 -> (2,), [2, 7, 2] -> (2, 7)."""
    if value is None:
        return ()
    ids = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"{name}={value!r:.80} must be a token id or a list of them")
    return tuple(dict.fromkeys(ids))

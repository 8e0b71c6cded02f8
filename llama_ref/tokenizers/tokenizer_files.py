"""The files of a tokenizer: what they are called, and how their text and JSON are read, with one line of error."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_ref.formats import lfs_pointers

JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
RANDOM_FILE = "random_tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
COMPANIONS = (SETTINGS_FILE, MAP_FILE, ADDED_FILE, TEMPLATE_FILE)


class TokenizerError(ValueError):
    """A tokenizer that is absent or unreadable; the message is one line and names the file."""


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: not readable as text ({error})") from error


def beside(where: object, name: str) -> str:
    """How a message names a file beside another one: (Path("m/tokenizer.json"), "a.json") -> "m/a.json"."""
    return str(where.with_name(name)) if isinstance(where, Path) and where.suffix != ".gguf" else f"{where}: {name}"


def read_texts(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """File name -> text, of those that are there."""
    return {name: read_text(directory / name) for name in names if (directory / name).is_file()}


def read_json_object(text: str, where: object) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.startswith(lfs_pointers.START.decode()):
            raise TokenizerError(f"{where}: {lfs_pointers.TOLD}") from error
        raise TokenizerError(f"{where}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{where}: holds no JSON object")
    return data


def read_config(directory: Path) -> dict[str, Any]:
    """The content of a directory's config.json, {} where there is none."""
    config = directory / "config.json"
    return read_json_object(read_text(config), config) if config.is_file() else {}


def refuse_undecodable(text: str) -> None:
    """Raise ValueError for a text with lone surrogates, which is what Python makes of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text holds bytes that are not UTF-8") from error

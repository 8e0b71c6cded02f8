"""Which prompts a caller means: text, ids or a conversation, one or several, from whatever library they come.

Told apart by what they hold: [5, 9] is one prompt, [[5, 9], [17]] are two, and an array [B, T] is B prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_ref.arguments import is_whole, row_of_ids, several, shown, text

WANTED = "text, token ids, or messages"


def prompts_of(name: str, given: Any) -> tuple[list[Any], bool]:
    """Each prompt as `prompt_of` gives it, and whether only one was meant: "a" -> (["a"], True); ["a"] -> (["a"], False).

    Raises TypeError or ValueError that names the argument `name`.
    """
    if isinstance(given, str):
        return [text(name, given)], True
    found = ids_within(name, given) if isinstance(given, Mapping) else several(name, given, WANTED)
    if found and is_part_of_one(found[0]):
        return [prompt_of(name, found)], True
    return [prompt_of(name, one) for one in found], False


def prompt_of(name: str, given: Any) -> str | list[int] | list[Mapping[str, Any]]:
    """One prompt: text, ids, or a conversation's messages."""
    if isinstance(given, str):
        return text(name, given)
    entries = ids_within(name, given) if isinstance(given, Mapping) else several(name, given, WANTED)
    if getattr(given, "ndim", 1) == 2 or isinstance(given, Mapping):  # [1, T]: how other libraries hand over one text
        entries = entries[0] if len(entries) == 1 and isinstance(entries[0], list) else entries
    if entries and all(isinstance(entry, Mapping) for entry in entries):
        return conversation_of(name, entries)
    if not all(is_whole(entry) for entry in entries):
        raise ValueError(f"{name}: a prompt is {WANTED}, not {shown(given)}")
    return row_of_ids(name, entries)


def conversation_of(name: str, given: Any) -> list[Mapping[str, Any]]:
    """A conversation: messages, {"role": ..., "content": ...}; raises TypeError or ValueError that names the argument `name`.

    A message's content may be None, or parts; which of them a template takes, it says itself.
    """
    messages = several(name, given, "messages, {'role': ..., 'content': ...}")
    for message in messages:
        if not isinstance(message, Mapping):
            raise TypeError(f"{name}: a message must be {{'role': ..., 'content': ...}}, not {shown(message)}")
        content = message.get("content")
        if isinstance(content, str):
            text(name, content)
        elif isinstance(content, (bytes, bytearray, memoryview)):
            raise TypeError(f"{name}: a message's content is {shown(content)}: it must be text, and bytes are none")
    return messages


def is_part_of_one(entry: Any) -> bool:
    """Whether what holds this is one prompt: an id (or a number that is none, as 1.5), a message."""
    is_number = not hasattr(entry, "__len__") and hasattr(entry, "__float__")
    return is_whole(entry) or is_number or (isinstance(entry, Mapping) and "input_ids" not in entry)


def ids_within(name: str, encoding: Mapping[str, Any]) -> list[Any]:
    """What a tokenizer of `transformers` returns, {"input_ids": ..., "attention_mask": ...}, without its padding."""
    if "input_ids" not in encoding:
        raise TypeError(f"{name}={shown(encoding)} must be {WANTED}; a conversation is a list of messages")
    ids = listed(name, encoding["input_ids"])
    if encoding.get("attention_mask") is None:
        return ids
    mask = listed(name, encoding["attention_mask"])
    if not (ids and isinstance(ids[0], list)):
        return unmasked(name, ids, mask)
    if len(ids) != len(mask):
        raise ValueError(f"{name}: {len(ids)} rows of input_ids, {len(mask)} of attention_mask")
    return [unmasked(name, *pair) for pair in zip(ids, mask)]


def listed(name: str, value: Any) -> list[Any]:
    """Rows as lists: (tensor([[5, 9]])), [tensor([5, 9])] -> [[5, 9]]."""
    return [row.tolist() if hasattr(row, "tolist") else row for row in several(name, value, "token ids")]


def unmasked(name: str, ids: Any, mask: Any) -> list[Any]:
    """The ids that are read: [0, 5, 9], [0, 1, 1] -> [5, 9]."""
    if not (isinstance(ids, list) and isinstance(mask, list) and len(ids) == len(mask)):
        raise ValueError(f"{name}: input_ids and attention_mask have different shapes")
    return [token for token, read in zip(ids, mask) if read]

"""What a tokenizer is: text to ids and back.

Whether a text starts with BOS is what a model's files say: Llama 2 does, SmolLM2 does not. `encode(text, bos=False)` is for text
that continues another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol


class Tokenizer(Protocol):
    """`eos_ids` are those the tokenizer's files name; a checkpoint's config may name more, and rules."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's Jinja template for conversations, if its files hold one that is meant without being named."""

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """All of them by name: {"default": ..., "tool_use": ...}."""
        ...

    @property
    def special_tokens(self) -> dict[str, str]:
        """What a chat template may name: {"bos_token": "<s>", "eos_token": "</s>", ...}."""
        ...

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text; with `bos`, led by BOS if the model's texts start with one."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids, without the text of special tokens unless that is asked for."""
        ...

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each id adds to a text in which something stands before it; None for ids that are no text, as
        special tokens. Joined, they are the UTF-8 of the text. TokenizerError where this cannot be said.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write the files from which load_tokenizer(directory) gives an equal tokenizer."""
        ...

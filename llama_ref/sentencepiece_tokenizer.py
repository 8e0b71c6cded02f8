"""A sentencepiece `tokenizer.model`, as Llama 1 and 2 and Mistral have it, with the tokens that were added beside it.

Special and added tokens are found in the text first; what stands between them is sentencepiece's. Each such stretch gets
the leading space that the model was trained with; where tokenizer_config.json says `"legacy": false`, only one at the
very start does.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_ref.chat_templates import DEFAULT, template_files, templates_of
from llama_ref.tokenizer import (
    COMPANIONS,
    SENTENCEPIECE_FILE,
    SETTINGS_FILE,
    TokenizerError,
    read_json_object,
    read_text,
)

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's own mark for a space
BORDER = "\x01"  # never part of a longer piece, so what follows it is encoded without a leading space


class SentencePieceTokenizer:
    """BOS leads unless tokenizer_config.json says that it does not."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model: Any = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError, TypeError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: neither a sentencepiece model nor a tiktoken file") from error
        self._path = path
        settings, added = path.with_name(SETTINGS_FILE), path.with_name("added_tokens.json")
        stated = read_json_object(read_text(settings), settings) if settings.is_file() else {}
        listed = read_json_object(read_text(added), added) if added.is_file() else {}
        self.adds_bos = stated.get("add_bos_token") is not False
        self._dummy_prefix_everywhere = stated.get("legacy") is not False
        self.bos_id = _none_if_negative(self._model.bos_id())
        eos = _none_if_negative(self._model.eos_id())
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        try:
            pieces = [self._model.id_to_piece(token) for token in range(int(self._model.vocab_size()))]
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path}: holds a piece that is no text ({error})") from error
        self._bytes = {token: int(pieces[token][3:5], 16) for token in range(len(pieces)) if self._model.is_byte(token)}
        self._text = {token: piece.replace(SPACE, " ") for token, piece in enumerate(pieces)}
        self._silent = {token for token in self._text if self._model.is_control(token)}
        matched = {pieces[token]: (token, "", "") for token in self._silent}
        unknown = int(self._model.unk_id())
        if 0 <= unknown < len(pieces):
            self._silent.add(unknown)
            matched[pieces[unknown]] = (unknown, "", "")
        self._base_size = len(pieces)
        matched |= self._added(stated, listed, settings)
        self._ids = {content: token for content, (token, _, _) in matched.items()}
        self._special = _pattern(matched)
        self._border = self._model.encode(BORDER)
        self.special_tokens = {
            name: self._text[token]
            for name, token in (("bos_token", self.bos_id), ("eos_token", eos))
            if token is not None
        }
        self.chat_templates = templates_of(template_files(path.parent), stated.get("chat_template"), settings)
        self.chat_template = self.chat_templates.get(DEFAULT)

    @property
    def vocab_size(self) -> int:
        return max(self._base_size, 1 + max(self._ids.values(), default=0))

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids = [self.bos_id] if bos and self.adds_bos and self.bos_id is not None else []
        end = 0
        for match in self._special.finditer(text):
            ids += self._stretch(text[end : match.start()], first=end == 0)
            ids.append(self._ids[match[match.lastindex or 0]])
            end = match.end()
        return ids + self._stretch(text[end:], first=end == 0)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids beyond the vocabulary are no text (a model's table may be padded), and special tokens only if asked for."""
        pieces: list[str] = []
        run = bytearray()
        for token in ids:
            if token in self._bytes:
                run.append(self._bytes[token])
                continue
            if run:
                pieces.append(run.decode(errors="replace"))
                run.clear()
            if token not in self._silent or not skip_special_tokens:
                pieces.append(self._text.get(token, ""))
        text = "".join(pieces) + run.decode(errors="replace")
        return text.removeprefix(" ")

    def save(self, directory: Path) -> None:
        for name in (SENTENCEPIECE_FILE, *COMPANIONS, *template_files(self._path.parent)):
            source = self._path if name == SENTENCEPIECE_FILE else self._path.parent / name
            if source.is_file():
                (directory / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source, directory / name)

    def _stretch(self, text: str, first: bool) -> list[int]:
        """The ids of text without special tokens; `first`: it starts the whole text."""
        if not text:
            return []
        if first or self._dummy_prefix_everywhere:
            return self._model.encode(text)  # type: ignore[no-any-return]
        ids: list[int] = self._model.encode(BORDER + text)
        if ids[: len(self._border)] != self._border:
            raise TokenizerError(f"{self._path}: has a piece across a control character, so no text without a prefix")
        return ids[len(self._border) :]

    def _added(self, stated: dict[str, Any], listed: dict[str, Any], where: Path) -> dict[str, tuple[int, str, str]]:
        """Added tokens: content -> (id, pattern of the space it swallows before, and after)."""
        found: dict[str, tuple[int, str, str]] = {}
        entries: list[tuple[Any, Any, dict[str, Any]]] = [(content, token, {}) for content, token in listed.items()]
        decoder = stated.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise TokenizerError(f"{where}: added_tokens_decoder is no object")
        for token, entry in decoder.items():
            if not isinstance(entry, dict) or not token.isdecimal():
                raise TokenizerError(f"{where}: added_tokens_decoder holds {token!r}, which is no token")
            entries.append((entry.get("content"), int(token), entry))
        for content, token, entry in entries:
            if not isinstance(content, str) or not content or isinstance(token, bool) or not isinstance(token, int):
                raise TokenizerError(f"{where}: an added token must have text and an id, not {content!r} and {token!r}")
            if not 0 <= token < 1 << 31:
                raise TokenizerError(f"{where}: the added token {content!r} has the id {token}")
            found[content] = (token, r"\s*" if entry.get("lstrip") else "", r"\s*" if entry.get("rstrip") else "")
            if token >= self._base_size:
                self._text[token] = content
            if entry.get("special"):
                self._silent.add(token)
        return found


def _pattern(matched: Mapping[str, tuple[int, str, str]]) -> re.Pattern[str]:
    """Finds special tokens, the longest first; the last group of a match is the token without the space around it."""
    longest_first = sorted(matched, key=len, reverse=True)
    parts, plain = [], [re.escape(content) for content in longest_first if matched[content][1:] == ("", "")]
    for content in longest_first:
        _, before, after = matched[content]
        if before or after:
            parts.append(f"{before}({re.escape(content)}){after}")
    # the many that swallow no space in one group: hundreds of groups would each cost time at every character
    return re.compile("|".join([*parts, f"({'|'.join(plain)})"] if plain else parts) or r"(?!)")


def _none_if_negative(token: int) -> int | None:
    return None if token < 0 else token

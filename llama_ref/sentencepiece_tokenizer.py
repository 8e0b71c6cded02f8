"""A sentencepiece `tokenizer.model`, as Llama 1 and 2 and Mistral have it, with the tokens that were added beside it.

Special and added tokens are found in the text first; what stands between them is sentencepiece's, by the normaliser that
the model was trained with. Each such stretch gets the model's leading space; where tokenizer_config.json says so
(`"legacy": false`, which is LlamaTokenizer's default), only one at the very start does, and with
`"add_prefix_space": false` none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_ref.added_tokens import AddedToken, AddedTokens
from llama_ref.chat import template_of
from llama_ref.companions import Companions, read_companions
from llama_ref.tokenizer_class import SPACE, class_of, prefixes_every_stretch, with_class
from llama_ref.tokenizer_files import (
    COMPANIONS,
    SENTENCEPIECE_FILE,
    SETTINGS_FILE,
    TEMPLATE_FILE,
    TokenizerError,
    beside,
    read_json_object,
    read_text,
    read_texts,
    refuse_undecodable,
)

# A message of protobuf's may be followed by fields that replace earlier ones: normalizer_spec { add_dummy_prefix: ... },
# fields 3 and 3 of sentencepiece_model.proto.
WITH_PREFIX, WITHOUT_PREFIX = b"\x1a\x02\x18\x01", b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """BOS leads unless tokenizer_config.json says that it does not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        files = read_texts(path.parent, COMPANIONS)
        config = path.with_name("config.json")
        kind = class_of(files, read_json_object(read_text(config), config) if config.is_file() else {}, path)
        self._files = with_class(files, kind, path)
        content = _content(path)
        self._model, self._unprefixed = _processor(content, path), _processor(content + WITHOUT_PREFIX, path)
        try:
            self._pieces: list[str] = [self._model.id_to_piece(i) for i in range(int(self._model.vocab_size()))]
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path}: holds a piece that is no text ({error})") from error
        own = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id(), "unk_token": self._model.unk_id()}
        defaults = {name: self._pieces[i] for name, i in own.items() if 0 <= i < len(self._pieces)}
        companions = read_companions(files, path, defaults=defaults)
        settings = companions.settings
        prefix = settings.get("add_prefix_space")
        self._has_prefix = self._model.encode("a") != self._unprefixed.encode("a")
        if isinstance(prefix, bool) and prefix != self._has_prefix:
            self._has_prefix = prefix
            self._model = _processor(content + WITH_PREFIX, path) if prefix else self._unprefixed
        self._prefixes_every_stretch = prefixes_every_stretch(kind, settings)
        added = self._added(companions)
        self._bytes = {i: int(self._pieces[i][3:5], 16) for i in range(len(self._pieces)) if self._model.is_byte(i)}
        self._text = {i: piece.replace(SPACE, " ") for i, piece in enumerate(self._pieces)}
        self._text |= {i: token.content.replace(SPACE, " ") for token, i in added.items()}
        self._silent = {i for token, i in added.items() if token.special}
        as_text = settings.get("split_special_tokens") is True
        self._tokens = AddedTokens({token: i for token, i in added.items() if not (as_text and token.special)})
        self._ids = {token.content: i for token, i in added.items()}
        self.special_tokens = {name: token.content for name, token in companions.named.items()}
        self.bos_id = self._ids.get(self.special_tokens.get("bos_token", ""))
        eos = self._ids.get(self.special_tokens.get("eos_token", ""))
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.adds_bos = settings.get("add_bos_token") is not False
        self.chat_template = files.get(TEMPLATE_FILE) or template_of(
            settings.get("chat_template"), beside(path, SETTINGS_FILE)
        )

    @property
    def vocab_size(self) -> int:
        return 1 + max(self._text)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        refuse_undecodable(text)
        ids = [self.bos_id] if bos and self.adds_bos and self.bos_id is not None else []
        for part in self._tokens.cut(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            stretch, first = part
            model = self._model if first or self._prefixes_every_stretch else self._unprefixed
            ids += model.encode(stretch)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids beyond the vocabulary are no text (a model's table may be padded), and special tokens only if asked for.

        A run of byte tokens is one piece of UTF-8, or none: then each byte is a replacement character, as in the
        `tokenizers` library.
        """
        pieces: list[str] = []
        run = bytearray()
        for token in ids:
            if token not in self._text or (skip_special_tokens and token in self._silent):
                continue
            if token in self._bytes:
                run.append(self._bytes[token])
                continue
            pieces += [_utf8(run), self._text[token]]
            run.clear()
        text = "".join([*pieces, _utf8(run)])
        return text.removeprefix(" ") if self._has_prefix else text

    def save(self, directory: Path) -> None:
        (directory / SENTENCEPIECE_FILE).write_bytes(_content(self._path))
        for name, text in self._files.items():
            (directory / name).write_text(text, encoding="utf-8")

    def _added(self, companions: Companions) -> dict[AddedToken, int]:
        """All tokens that are found in a text before sentencepiece sees it: its control pieces, and the companions'."""
        control = [i for i in range(len(self._pieces)) if self._model.is_control(i)]
        found = {self._pieces[i]: (AddedToken(self._pieces[i], special=True), i) for i in control}
        known = {piece: i for i, piece in reversed(list(enumerate(self._pieces)))}
        known |= {token.content: i for i, token in companions.listed.items()}
        for token in companions.tokens(found):
            index = known.setdefault(token.content, 1 + max(len(self._pieces) - 1, *known.values()))
            found[token.content] = (token, index)
        renamed = {i for i, token in companions.listed.items() if i < len(self._pieces)}
        return {
            token: i
            for content, (token, i) in found.items()
            if i not in renamed or companions.listed[i].content == content
        }


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: not readable ({error})") from error


def _processor(content: bytes, path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError, TypeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: neither a sentencepiece model nor a tiktoken file") from error


def _utf8(run: bytearray) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\N{REPLACEMENT CHARACTER}" * len(run)

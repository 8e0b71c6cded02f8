"""A sentencepiece `tokenizer.model`, as Llama 1 and 2 and Mistral have it, with the tokens that were added beside it.

Special and added tokens are found in the text first; what stands between them is sentencepiece's, by the normaliser that
the model was trained with. Each such stretch gets the model's leading space; where tokenizer_config.json says so
(`"legacy": false`, which is LlamaTokenizer's default), only one at the very start does, and with
`"add_prefix_space": false` none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from llama_ref.tokenizers.added_tokens import AddedToken, AddedTokens
from llama_ref.tokenizers.chat_templates import DEFAULT, template_files, templates_of
from llama_ref.tokenizers.companions import Companions, read_companions
from llama_ref.tokenizers.sentencepiece_model import SentencePieceModel
from llama_ref.tokenizers.tokenizer_class import GENERIC, SPACE, class_of, prefixes_every_stretch, with_class
from llama_ref.tokenizers.tokenizer_files import (
    COMPANIONS,
    SENTENCEPIECE_FILE,
    SETTINGS_FILE,
    TokenizerError,
    beside,
    read_config,
    read_texts,
    refuse_undecodable,
)


class SentencePieceTokenizer:
    """BOS leads unless tokenizer_config.json says that it does not."""

    def __init__(self, path: Path) -> None:
        files = read_texts(path.parent, COMPANIONS) | template_files(path.parent)
        kind = class_of(files, read_config(path.parent), path)
        self._path, self._files = path, with_class(files, kind, path)
        self._model = SentencePieceModel(_content(path), path)
        companions = read_companions(files, path, defaults=self._model.names)
        settings = companions.settings
        if isinstance(prefix := settings.get("add_prefix_space"), bool):
            self._model.overrule_prefix(prefix)
        self._prefixes_every_stretch = prefixes_every_stretch(kind, settings)
        added = _ids_of_tokens(self._model, companions, raw=kind == GENERIC and self._model.has_prefix)
        self._ids = {token.content: index for token, index in added.items()}
        self._text = {index: piece.replace(SPACE, " ") for index, piece in enumerate(self._model.pieces)}
        self._text |= {index: token.content.replace(SPACE, " ") for token, index in added.items()}
        self._silent = {index for token, index in added.items() if token.special}
        as_text = settings.get("split_special_tokens") is True
        self._tokens = AddedTokens({token: i for token, i in added.items() if not (as_text and token.special)})
        self.special_tokens = {name: token.content for name, token in companions.named.items()}
        self.bos_id = self._ids.get(self.special_tokens.get("bos_token", ""))
        eos = self._ids.get(self.special_tokens.get("eos_token", ""))
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.adds_bos = settings.get("add_bos_token") is not False
        self.chat_templates = templates_of(files, settings.get("chat_template"), beside(path, SETTINGS_FILE))
        self.chat_template = self.chat_templates.get(DEFAULT)

    @property
    def vocab_size(self) -> int:
        return 1 + max(self._text)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        refuse_undecodable(text)
        ids = [self.bos_id] if bos and self.adds_bos and self.bos_id is not None else []
        for part in self._tokens.cut(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                stretch, first = part
                ids += self._model.encode(stretch, prefix=first or self._prefixes_every_stretch)
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
            if token in self._model.bytes:
                run.append(self._model.bytes[token])
                continue
            pieces += [_utf8(run), self._text[token]]
            run.clear()
        text = "".join([*pieces, _utf8(run)])
        return text.removeprefix(" ") if self._model.has_prefix else text

    def token_bytes(self) -> list[bytes | None]:
        """Of every id up to the largest."""
        unknown = self._ids.get(self.special_tokens.get("unk_token", ""))
        found: list[bytes | None] = [None] * self.vocab_size
        for index, text in self._text.items():
            if index in self._model.bytes:
                found[index] = bytes([self._model.bytes[index]])
            elif index not in self._silent and index != unknown:
                found[index] = text.encode()
        return found

    def save(self, directory: Path) -> None:
        (directory / SENTENCEPIECE_FILE).write_bytes(_content(self._path))
        for name, text in self._files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")


def _ids_of_tokens(model: SentencePieceModel, companions: Companions, raw: bool) -> dict[AddedToken, int]:
    """The tokens that are found in a text before sentencepiece sees it: the model's control symbols, and its companions'.

    A listed token has the id that is listed, and so renames a piece of that id; another one that of the piece with its
    text, or the next that is free. `raw`: listed tokens are looked for before any normaliser, as in transformers.
    """
    listed = companions.listed
    renamed = {index for index in listed if index < len(model.pieces)}
    found = {
        model.pieces[index]: (AddedToken(model.pieces[index], special=True), index)
        for index in model.control
        if index not in renamed
    }
    known = {piece: index for index, piece in reversed(list(enumerate(model.pieces))) if index not in renamed}
    known |= {token.content: index for index, token in listed.items()}
    for token in companions.tokens(found):
        index = known.setdefault(token.content, 1 + max(len(model.pieces) - 1, *known.values()))
        by_id = raw and index in listed
        found[token.content] = (dataclasses.replace(token, normalized=False) if by_id else token, index)
    return dict(found.values())


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: not readable ({error})") from error


def _utf8(run: bytearray) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\N{REPLACEMENT CHARACTER}" * len(run)

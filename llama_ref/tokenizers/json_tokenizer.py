"""A Hugging Face `tokenizer.json` with what stands beside it, run by the `tokenizers` library alone: importing
transformers takes seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_ref.tokenizers.added_tokens import AddedToken
from llama_ref.tokenizers.companions import read_companions
from llama_ref.tokenizers.tokenizer_class import DEFAULTS, as_the_class_reads, class_of, with_class
from llama_ref.tokenizers.tokenizer_files import (
    COMPANIONS,
    JSON_FILE,
    SETTINGS_FILE,
    TokenizerError,
    beside,
    read_config,
    read_json_object,
    read_texts,
    refuse_undecodable,
)

UNREADABLE = f"not a readable {JSON_FILE}"


class JsonTokenizer:
    """BOS leads where tokenizer_config.json's `add_bos_token` or, if it is silent, tokenizer.json says so."""

    def __init__(self, files: Mapping[str, str], where: object = JSON_FILE, kind: str | None = None) -> None:
        """`files` maps file names to their text: tokenizer.json and, if there are any, its companions. `kind` is the
        tokenizer's class, if more than these files decides it."""
        from llama_ref.tokenizers.chat_templates import DEFAULT, templates_of

        kind = kind or class_of(files, {}, where)
        self._where = where
        self._files = with_class(files, kind, where)
        settings = read_json_object(files.get(SETTINGS_FILE, "{}"), beside(where, SETTINGS_FILE))
        text = files[JSON_FILE]
        data = read_json_object(text, where)
        _refuse_prefixed_merges(data, where)
        of_file = _backend(text, where)
        self._backend = of_file
        of_class = as_the_class_reads(text, data, kind, settings)
        if of_class != text:
            self._backend = _backend(of_class, where)
        padding = of_file.padding or {}
        defaults = DEFAULTS[kind] | ({"pad_token": padding["pad_token"]} if padding else {})
        own = {index: _as_ours(token) for index, token in of_file.get_added_tokens_decoder().items()}
        companions = read_companions(files, where, own, defaults)
        self._add(companions.tokens([token.content for token in self._backend.get_added_tokens_decoder().values()]))
        for index, token in companions.listed.items():
            if (got := self._backend.token_to_id(token.content)) != index:
                warnings.warn(f"{where}: {token.content!r} has the id {got} here, not {index} as listed", stacklevel=2)
        self._backend.encode_special_tokens = settings.get("split_special_tokens") is True
        self._backend.no_truncation()  # a file may carry the lengths of its training run
        self._backend.no_padding()
        self.special_tokens = {name: token.content for name, token in companions.named.items()}
        self.chat_templates = templates_of(files, settings.get("chat_template"), beside(where, SETTINGS_FILE))
        self.chat_template = self.chat_templates.get(DEFAULT)
        lead, tail = self._around()
        self.bos_id = self._id_of("bos_token")
        if self.bos_id is None and lead:
            self.bos_id = lead[0]
        eos = self._id_of("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        stated = settings.get("add_bos_token")
        if isinstance(stated, bool):
            bos = [self.bos_id] if stated and self.bos_id is not None else []
            lead = bos + [token for token in lead if token != self.bos_id]
        self._lead = lead
        if tail:
            warnings.warn(
                f"{where}: puts ids {tail} behind a text; a text is encoded to be continued, so they are left out",
                stacklevel=2,
            )
        _say_if_spaces_would_be_cleaned(settings, self._backend, where)

    @classmethod
    def from_directory(cls, directory: Path) -> JsonTokenizer:
        where = directory / JSON_FILE
        from llama_ref.tokenizers.chat_templates import template_files

        files = read_texts(directory, (JSON_FILE, *COMPANIONS)) | template_files(directory)
        return cls(files, where, class_of(files, read_config(directory), where))

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)  # type: ignore[no-any-return]

    def encode(self, text: str, bos: bool = True) -> list[int]:
        refuse_undecodable(text)
        with _in_our_words(self._where, "the tokenizers library cannot encode this text"):
            ids = self._backend.encode(text, add_special_tokens=False).ids
        return [*self._lead, *ids] if bos else list(ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        with _in_our_words(self._where, "the tokenizers library cannot decode these ids"):
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self) -> list[bytes | None]:
        """Of every id up to the largest; raises TokenizerError, by name, for decoders that no single token can be put through."""
        from llama_ref.tokenizers.token_bytes import piece_decoder

        decoder = self._backend.decoder
        decoder = None if decoder is None else json.loads(decoder.__getstate__())
        try:
            decoded = piece_decoder(decoder)
        except ValueError as error:
            raise TokenizerError(f"{self._where}: {error}") from None
        silent = {index for index, token in self._backend.get_added_tokens_decoder().items() if token.special}
        silent |= {index for name in self.special_tokens if (index := self._id_of(name)) is not None}
        pieces = {index: piece for piece, index in self._backend.get_vocab(with_added_tokens=True).items()}
        found: list[bytes | None] = [None] * (1 + max(pieces, default=-1))
        for index, piece in pieces.items():
            if index not in silent:
                found[index] = decoded(piece.encode())
        return found

    def save(self, directory: Path) -> None:
        for name, text in self._files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")

    def _id_of(self, name: str) -> int | None:
        """The id of a special token by its name, as "bos_token"."""
        content = self.special_tokens.get(name)
        return None if content is None else self._backend.token_to_id(content)

    def _add(self, tokens: Sequence[AddedToken]) -> None:
        from tokenizers import AddedToken as Theirs

        with _in_our_words(self._where):
            self._backend.add_tokens([Theirs(**dataclasses.asdict(token)) for token in tokens])

    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that tokenizer.json puts before a text and behind it."""
        with _in_our_words(self._where):
            for probe in ("a", " ", "1", "\N{CJK UNIFIED IDEOGRAPH-4E00}"):  # a vocabulary may lack some
                dressed = self._backend.encode(probe, add_special_tokens=True)
                inner = [at for at, part in enumerate(dressed.sequence_ids) if part is not None]
                if inner:
                    return dressed.ids[: inner[0]], dressed.ids[inner[-1] + 1 :]
        return [], []


def _refuse_prefixed_merges(data: Mapping[str, Any], where: object) -> None:
    model = data.get("model")
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) and "merges" in model else None
    if prefix:  # no Llama has one, and the library trusts it: a merge without the prefix ends the process
        raise TokenizerError(f"{where}: continuing_subword_prefix={prefix!r:.40} is not supported beside merges")


def _backend(text: str, where: object) -> Any:
    from tokenizers import Tokenizer as Backend

    with _in_our_words(where):
        return Backend.from_str(text)


def _as_ours(token: Any) -> AddedToken:
    return AddedToken(
        token.content, token.special, token.single_word, token.lstrip, token.rstrip, normalized=token.normalized
    )


def _say_if_spaces_would_be_cleaned(settings: Mapping[str, Any], backend: Any, where: object) -> None:
    """transformers cleans up spaces for vocabularies without merges, and for others only if it is told twice."""
    merges = type(backend.model).__name__ == "BPE"
    insisted = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    if settings.get("clean_up_tokenization_spaces") and (insisted or not merges):
        file = beside(where, SETTINGS_FILE)
        warnings.warn(f"{file}: clean_up_tokenization_spaces is not followed: text keeps its spaces", stacklevel=3)


@contextlib.contextmanager
def _in_our_words(where: object, failed: str = UNREADABLE) -> Iterator[None]:
    """Make whatever the `tokenizers` library raises a TokenizerError of one line: it raises bare Exception, or panics,
    which is not even that. A damaged file does it, and a few texts where added tokens want the same spaces."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        told = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{where}: {failed} ({told})") from error

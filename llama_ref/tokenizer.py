"""Tokenizers: text to ids and back, from the files that stand beside the weights.

Whether a text starts with BOS is what those files say: Llama 2 does, SmolLM2 does not. `encode(text, bos=False)` is
for text that continues another.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

DEFAULT_PROMPT = "Hello, my name is"
DEFAULT_PROMPT_LLAMA_IDS = (1, 15043, 29892, 590, 1024, 338)

JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
RANDOM_FILE = "random_tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
COMPANIONS = (SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class TokenizerError(ValueError):
    """A tokenizer that is absent or unreadable; the message is one line and names the file."""


class Tokenizer(Protocol):
    """`eos_ids` are those the tokenizer's files name; a checkpoint's config may name more, and rules."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text; with `bos`, led by BOS if the model's texts start with one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        ...

    def save(self, directory: Path) -> None:
        """Write the files from which load_tokenizer(directory) gives an equal tokenizer."""
        ...


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`, run by the `tokenizers` library alone: importing transformers takes seconds."""

    def __init__(self, files: Mapping[str, str], where: object = JSON_FILE) -> None:
        """`files` maps file names to their text: tokenizer.json and, if there are any, its companions."""
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(files[JSON_FILE])
        except Exception as error:  # `tokenizers` raises bare Exception
            raise TokenizerError(f"{where}: not a readable tokenizer.json ({' '.join(str(error).split())})") from error
        self._files = dict(files)
        self._backend.no_truncation()  # a file may carry the lengths of its training run
        self._backend.no_padding()
        settings = _json_object(files.get(SETTINGS_FILE, "{}"), where)
        specials = _json_object(files.get("special_tokens_map.json", "{}"), where) | settings
        self.bos_id = self._id_of(specials.get("bos_token"))
        eos = self._id_of(specials.get("eos_token"))
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        template_lead = self._template_lead()
        if self.bos_id is None:
            self.bos_id = template_lead
        stated = settings.get("add_bos_token")
        self.adds_bos = stated if isinstance(stated, bool) else template_lead == self.bos_id is not None

    @classmethod
    def from_directory(cls, directory: Path) -> JsonTokenizer:
        names = [name for name in (JSON_FILE, *COMPANIONS) if (directory / name).is_file()]
        return cls({name: _read_text(directory / name) for name in names}, directory / JSON_FILE)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos and self.adds_bos and self.bos_id is not None else list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        for name, text in self._files.items():
            (directory / name).write_text(text, encoding="utf-8")

    def _id_of(self, token: Any) -> int | None:
        """A special token as files spell it: "<s>", or {"content": "<s>", ...}."""
        content = token.get("content") if isinstance(token, dict) else token
        return self._backend.token_to_id(content) if isinstance(content, str) else None

    def _template_lead(self) -> int | None:
        """The special token that tokenizer.json itself puts before a text, which is BOS where no setting speaks."""
        plain = self._backend.encode("a", add_special_tokens=False).ids
        dressed = self._backend.encode("a", add_special_tokens=True).ids
        return None if dressed[: len(plain)] == plain else dressed[0]


class SentencePieceTokenizer:
    """A sentencepiece `tokenizer.model`, as Llama 2 has it. BOS leads unless tokenizer_config.json says it does not."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model: Any = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError, TypeError) as error:
            raise TokenizerError(
                f"{path}: not a sentencepiece model (of a Llama-3 directory tokenizer.json is read instead)"
            ) from error
        self._path = path
        settings = path.with_name(SETTINGS_FILE)
        stated = _json_object(_read_text(settings), settings) if settings.is_file() else {}
        self.adds_bos = stated.get("add_bos_token") is not False
        self.bos_id = _none_if_negative(self._model.bos_id())
        eos = _none_if_negative(self._model.eos_id())
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)

    @property
    def vocab_size(self) -> int:
        return int(self._model.vocab_size())

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return [self.bos_id, *ids] if bos and self.adds_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        # a model's table may be padded beyond the vocabulary; control pieces decode to nothing by themselves
        text: str = self._model.decode([token for token in ids if token < self.vocab_size])
        return text

    def save(self, directory: Path) -> None:
        for name in (SENTENCEPIECE_FILE, *COMPANIONS):
            source = self._path if name == SENTENCEPIECE_FILE else self._path.with_name(name)
            if source.is_file():
                shutil.copyfile(source, directory / name)


class RandomTokenizer:
    """For models with random weights, which have no language: ids in, ids out.

    The default prompt becomes its six Llama ids, so that timings compare with those of the real model; any other
    text is its bytes modulo the vocabulary. `decode` prints ids: [5, 2] -> "5 2".
    """

    def __init__(self, vocab_size: int, bos_id: int | None, eos_ids: tuple[int, ...]) -> None:
        self.vocab_size, self.bos_id, self.eos_ids = vocab_size, bos_id, eos_ids

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids: Sequence[int] = text.encode()
        if text == DEFAULT_PROMPT:
            ids = DEFAULT_PROMPT_LLAMA_IDS if bos else DEFAULT_PROMPT_LLAMA_IDS[1:]
        return [token % self.vocab_size for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(token)) for token in ids)

    def save(self, directory: Path) -> None:
        data = {"vocab_size": self.vocab_size, "bos_id": self.bos_id, "eos_ids": list(self.eos_ids)}
        (directory / RANDOM_FILE).write_text(json.dumps(data) + "\n")


def has_tokenizer(path: Path) -> bool:
    """Whether load_tokenizer would find a tokenizer of a language at `path` (a directory, or a GGUF file)."""
    if path.is_file():
        return path.suffix == ".gguf"
    return any((path / name).is_file() for name in (JSON_FILE, SENTENCEPIECE_FILE)) or len(_ggufs(path)) == 1


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory or GGUF file; raises TokenizerError.

    tokenizer.json comes before tokenizer.model, since only it knows tokens that were added later; without the
    `tokenizers` library the latter has to do.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path)
    if (path / RANDOM_FILE).is_file():
        data = _json_object(_read_text(path / RANDOM_FILE), path / RANDOM_FILE)
        return RandomTokenizer(data["vocab_size"], data["bos_id"], tuple(data["eos_ids"]))
    if (path / JSON_FILE).is_file():
        try:
            return JsonTokenizer.from_directory(path)
        except ImportError as error:
            if not (path / SENTENCEPIECE_FILE).is_file():
                raise TokenizerError(f"{path / JSON_FILE}: reading it needs `pip install tokenizers`") from error
    if (path / SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer(path / SENTENCEPIECE_FILE)
    if len(_ggufs(path)) == 1:
        return _from_gguf(_ggufs(path)[0])
    raise TokenizerError(f"{path}: neither {JSON_FILE} nor {SENTENCEPIECE_FILE} in this directory")


def _from_gguf(path: Path) -> Tokenizer:
    from llama_ref.gguf_tokenizer import files_of_gguf

    return JsonTokenizer(files_of_gguf(path), path)


def _ggufs(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.gguf"))


def _none_if_negative(token: int) -> int | None:
    return None if token < 0 else token


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: not readable as text ({error})") from error


def _json_object(text: str, where: object) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise TokenizerError(f"{where}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{where}: holds no JSON object")
    return data

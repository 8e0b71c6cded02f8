"""Tokenizers: text to ids and back, from the files that stand beside the weights.

Whether a text starts with BOS is what those files say: Llama 2 does, SmolLM2 does not. `encode(text, bos=False)` is
for text that continues another.
"""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llama_ref.arguments import named

DEFAULT_PROMPT = "Hello, my name is"
DEFAULT_PROMPT_LLAMA_IDS = (1, 15043, 29892, 590, 1024, 338)

JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
RANDOM_FILE = "random_tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
COMPANIONS = (SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE)


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

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's Jinja template for conversations, if its files hold one."""

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

    def save(self, directory: Path) -> None:
        """Write the files from which load_tokenizer(directory) gives an equal tokenizer."""
        ...


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`, run by the `tokenizers` library alone: importing transformers takes seconds."""

    def __init__(self, files: Mapping[str, str], where: object = JSON_FILE) -> None:
        """`files` maps file names to their text: tokenizer.json and, if there are any, its companions."""
        from tokenizers import Tokenizer as Backend

        from llama_ref.chat import template_of

        self._where = where
        with _in_our_words(where):
            self._backend = Backend.from_str(files[JSON_FILE])
        self._files = dict(files)
        self._backend.no_truncation()  # a file may carry the lengths of its training run
        self._backend.no_padding()
        settings = read_json_object(files.get(SETTINGS_FILE, "{}"), where)
        specials = read_json_object(files.get("special_tokens_map.json", "{}"), where) | settings
        self.bos_id = self._id_of(specials.get("bos_token"))
        eos = self._id_of(specials.get("eos_token"))
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        template_lead = self._template_lead()
        if self.bos_id is None:
            self.bos_id = template_lead
        self.special_tokens = {
            name: text for name, token in specials.items() if name.endswith("_token") and (text := _content(token))
        }
        self.chat_template = files.get(TEMPLATE_FILE) or template_of(settings.get("chat_template"), where)
        stated = settings.get("add_bos_token")
        self.adds_bos = stated if isinstance(stated, bool) else template_lead == self.bos_id is not None

    @classmethod
    def from_directory(cls, directory: Path) -> JsonTokenizer:
        names = [name for name in (JSON_FILE, *COMPANIONS) if (directory / name).is_file()]
        return cls({name: read_text(directory / name) for name in names}, directory / JSON_FILE)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the text holds bytes that are not UTF-8") from error
        with _in_our_words(self._where):
            ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos and self.adds_bos and self.bos_id is not None else list(ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        with _in_our_words(self._where):
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def save(self, directory: Path) -> None:
        for name, text in self._files.items():
            (directory / name).write_text(text, encoding="utf-8")

    def _id_of(self, token: Any) -> int | None:
        """A special token as files spell it: "<s>", or {"content": "<s>", ...}."""
        content = _content(token)
        return None if content is None else self._backend.token_to_id(content)

    def _template_lead(self) -> int | None:
        """The special token that tokenizer.json itself puts before a text, which is BOS where no setting speaks."""
        with _in_our_words(self._where):
            plain = self._backend.encode("a", add_special_tokens=False).ids
            dressed = self._backend.encode("a", add_special_tokens=True).ids
        return None if dressed[: len(plain)] == plain else dressed[0]


class RandomTokenizer:
    """For models with random weights, which have no language: ids in, ids out.

    The default prompt becomes its six Llama ids, so that timings compare with those of the real model; any other
    text is its bytes modulo the vocabulary. `decode` prints ids: [5, 2] -> "5 2".
    """

    def __init__(self, vocab_size: int, bos_id: int | None, eos_ids: tuple[int, ...]) -> None:
        if vocab_size < 1:
            raise TokenizerError(f"vocab_size={vocab_size} must be positive")
        self.vocab_size, self.bos_id, self.eos_ids = vocab_size, bos_id, eos_ids
        self.chat_template: str | None = None
        self.special_tokens: dict[str, str] = {}

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids: Sequence[int] = text.encode()
        if text == DEFAULT_PROMPT:
            ids = DEFAULT_PROMPT_LLAMA_IDS if bos else DEFAULT_PROMPT_LLAMA_IDS[1:]
        return [token % self.vocab_size for token in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(int(token)) for token in ids)

    def save(self, directory: Path) -> None:
        data = {"vocab_size": self.vocab_size, "bos_id": self.bos_id, "eos_ids": list(self.eos_ids)}
        (directory / RANDOM_FILE).write_text(json.dumps(data) + "\n")


def has_tokenizer(path: Path) -> bool:
    """Whether load_tokenizer would find a tokenizer of a language at `path`."""
    from llama_ref.gguf_tokenizer import has_vocabulary

    path = _place(path)
    if path.is_file():
        return has_vocabulary(path)
    if any((path / name).is_file() for name in (JSON_FILE, SENTENCEPIECE_FILE)):
        return True
    return len(_ggufs(path)) == 1 and has_vocabulary(_ggufs(path)[0])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model's directory or file: a GGUF holds its own, any other file's stands in its directory.

    tokenizer.json comes before tokenizer.model, since only it knows tokens that were added later; without the
    `tokenizers` library the latter has to do. Raises TokenizerError.
    """
    path = _place(Path(named("path", path)).expanduser())
    if path.is_file():
        return _from_gguf(path)
    if (path / RANDOM_FILE).is_file():
        return _random(read_json_object(read_text(path / RANDOM_FILE), path / RANDOM_FILE), path / RANDOM_FILE)
    if (path / JSON_FILE).is_file():
        try:
            return JsonTokenizer.from_directory(path)
        except ImportError as error:
            if not (path / SENTENCEPIECE_FILE).is_file():
                raise TokenizerError(f"{path / JSON_FILE}: reading it needs `pip install tokenizers`") from error
    if (path / SENTENCEPIECE_FILE).is_file():
        return _from_model_file(path / SENTENCEPIECE_FILE)
    if len(_ggufs(path)) == 1:
        return _from_gguf(_ggufs(path)[0])
    raise TokenizerError(f"{path}: neither {JSON_FILE} nor {SENTENCEPIECE_FILE} in this directory")


def _place(path: Path) -> Path:
    """Where a model's tokenizer is: "m.gguf" -> "m.gguf", "m/model.pth" -> "m", "m" -> "m"."""
    return path.parent if path.is_file() and path.suffix != ".gguf" else path


def _random(data: dict[str, Any], where: Path) -> RandomTokenizer:
    try:
        bos_id = data["bos_id"]
        return RandomTokenizer(
            operator.index(data["vocab_size"]),
            None if bos_id is None else operator.index(bos_id),
            tuple(operator.index(token) for token in data["eos_ids"]),
        )
    except (KeyError, TypeError) as error:
        raise TokenizerError(f"{where}: must state vocab_size, bos_id and eos_ids") from error


def _from_model_file(path: Path) -> Tokenizer:
    """`tokenizer.model` is sentencepiece's, or in a Llama-3 directory of Meta's tiktoken's."""
    from llama_ref.tiktoken_file import files_of_tiktoken, is_tiktoken

    if is_tiktoken(path):
        try:
            return JsonTokenizer(files_of_tiktoken(path), path)
        except ImportError as error:
            raise TokenizerError(f"{path}: reading a tiktoken file needs `pip install tokenizers`") from error
    from llama_ref.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(path)


def _from_gguf(path: Path) -> Tokenizer:
    from llama_ref.gguf_tokenizer import files_of_gguf

    return JsonTokenizer(files_of_gguf(path), path)


def _ggufs(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.gguf"))


@contextlib.contextmanager
def _in_our_words(where: object) -> Iterator[None]:
    """A damaged file makes the `tokenizers` library raise bare Exception, or panic, which is not even that."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        told = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{where}: not a readable tokenizer.json ({told})") from error


def _content(token: Any) -> str | None:
    """The text of a special token as files spell it: "<s>", or {"content": "<s>", ...}."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: not readable as text ({error})") from error


def read_json_object(text: str, where: object) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{where}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{where}: holds no JSON object")
    return data

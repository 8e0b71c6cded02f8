"""The tokenizer of a model's directory or file, and that of models which have no language."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_ref.arguments import named
from llama_ref.tokenizers.contract import Tokenizer
from llama_ref.tokenizers.json_tokenizer import JsonTokenizer
from llama_ref.tokenizers.tokenizer_files import (
    JSON_FILE,
    RANDOM_FILE,
    SENTENCEPIECE_FILE,
    TokenizerError,
    read_json_object,
    read_text,
)

DEFAULT_PROMPT = "Hello, my name is"
DEFAULT_PROMPT_LLAMA_IDS = (1, 15043, 29892, 590, 1024, 338)


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
        self.chat_templates: dict[str, str] = {}
        self.special_tokens: dict[str, str] = {}

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids: Sequence[int] = text.encode()
        if text == DEFAULT_PROMPT:
            ids = DEFAULT_PROMPT_LLAMA_IDS if bos else DEFAULT_PROMPT_LLAMA_IDS[1:]
        return [token % self.vocab_size for token in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(int(token)) for token in ids)

    def token_bytes(self) -> list[bytes | None]:
        raise TokenizerError("a model with random weights has no language: its tokens stand for no text")

    def save(self, directory: Path) -> None:
        data = {"vocab_size": self.vocab_size, "bos_id": self.bos_id, "eos_ids": list(self.eos_ids)}
        (directory / RANDOM_FILE).write_text(json.dumps(data) + "\n")


def has_tokenizer(path: Path) -> bool:
    """Whether load_tokenizer would find a tokenizer of a language at `path`."""
    from llama_ref.tokenizers.gguf_tokenizer import has_vocabulary

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
    from llama_ref.tokenizers.tiktoken_file import files_of_tiktoken, is_tiktoken

    if is_tiktoken(path):
        try:
            return JsonTokenizer(files_of_tiktoken(path), path)
        except ImportError as error:
            raise TokenizerError(f"{path}: reading a tiktoken file needs `pip install tokenizers`") from error
    from llama_ref.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(path)


def _from_gguf(path: Path) -> Tokenizer:
    from llama_ref.tokenizers.gguf_tokenizer import tokenizer_of_gguf

    return tokenizer_of_gguf(path)


def _ggufs(directory: Path) -> list[Path]:
    from llama_ref.formats.gguf_header import gguf_files

    return gguf_files(directory)

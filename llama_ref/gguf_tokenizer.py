"""A GGUF file's tokenizer as a tokenizer.json: converted by transformers once, which takes seconds, then cached.

The cache is keyed by the file's header, which holds the whole vocabulary: another file, another key.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_ref.cache_folder import cache_folder
from llama_ref.gguf_header import read_header
from llama_ref.tokenizer import JSON_FILE, SETTINGS_FILE, TokenizerError

CONVERSION = 2  # part of the key: raise it when what is derived changes
TOKENS = "tokenizer.ggml.tokens"
NAMED = "tokenizer.chat_template."  # and a name: a template besides the one meant without a name


def has_vocabulary(path: Path) -> bool:
    """Whether a GGUF file holds a tokenizer; raises CheckpointError if it is no GGUF."""
    return TOKENS in read_header(path).metadata


def files_of_gguf(path: Path) -> dict[str, str]:
    """File name -> text of tokenizer.json and tokenizer_config.json; raises TokenizerError."""
    header = read_header(path)
    if TOKENS not in header.metadata:
        raise TokenizerError(f"{path}: holds no tokenizer")
    cached = cache_folder() / "tokenizers" / f"{header.fingerprint[:32]}-{CONVERSION}"
    try:
        return {name: (cached / name).read_text(encoding="utf-8") for name in (JSON_FILE, SETTINGS_FILE)}
    except (OSError, UnicodeDecodeError):
        files = {JSON_FILE: _convert(path), SETTINGS_FILE: json.dumps(settings_of(header.metadata), indent=2) + "\n"}
        with contextlib.suppress(OSError):  # a cache that cannot be written costs seconds, not the answer
            store(cached, files)
        return files


def settings_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer_config.json that a GGUF's metadata amounts to. Where it does not say whether texts start with BOS,
    llama.cpp's defaults hold: sentencepiece vocabularies and Llama 3's do, other byte-pair ones do not."""
    tokens = metadata[TOKENS]
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe")),
    }
    for name in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None and 0 <= token < len(tokens):
            settings[f"{name}_token"] = tokens[token]
    named = {name.removeprefix(NAMED): text for name, text in metadata.items() if name.startswith(NAMED)}
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = {"default": template} | named if named else template
    elif named:
        settings["chat_template"] = named
    return settings


def _convert(path: Path) -> str:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise TokenizerError(f"{path}: a GGUF's tokenizer needs `pip install transformers gguf`") from error
    try:
        with tempfile.TemporaryDirectory(
            prefix="llama-gguf-"
        ) as alone:  # a tokenizer.json beside it would be preferred
            (Path(alone) / path.name).symlink_to(path.resolve())
            tokenizer: Any = AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
            text: str = tokenizer.backend_tokenizer.to_str()
            return text
    except Exception as error:  # transformers raises many kinds for a vocabulary that it does not know
        told = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{path}: its tokenizer could not be converted ({told})") from error


def store(directory: Path, files: Mapping[str, str]) -> None:
    """Write a directory that appears whole; of two processes that do so at once, one wins and both are content."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = directory.with_name(f".{directory.name}-{uuid.uuid4().hex[:8]}")
    try:
        draft.mkdir()
        for name, text in files.items():
            (draft / name).write_text(text, encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)  # half of an older one
        os.replace(draft, directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)

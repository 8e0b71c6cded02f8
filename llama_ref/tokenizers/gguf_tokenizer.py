"""A GGUF file's tokenizer as the files of any other model: made once from its metadata, then cached.

A byte-pair vocabulary becomes a tokenizer.json, a sentencepiece one a tokenizer.model. The cache is keyed by the file's
header, which holds the whole vocabulary, and by the number of this conversion: no other library has a part in it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_ref.cache_folder import cache_folder, store
from llama_ref.formats.fields import flag
from llama_ref.formats.gguf_header import Header, first_part, read_header
from llama_ref.formats.gguf_vocabulary import (
    BYTE_PAIR,
    KINDS,
    SCORES,
    SENTENCEPIECE,
    TOKENS,
    read_vocabulary,
    role_id,
    warn_of_ids,
)
from llama_ref.tokenizers.contract import Tokenizer
from llama_ref.tokenizers.gguf_byte_pair import PRE, byte_pair_json, pretokenizer_of
from llama_ref.tokenizers.gguf_sentencepiece import added_tokens, adds_space, sentencepiece_model
from llama_ref.tokenizers.json_tokenizer import JsonTokenizer
from llama_ref.tokenizers.tokenizer_files import JSON_FILE, SENTENCEPIECE_FILE, SETTINGS_FILE, TokenizerError

CONVERSION = 5  # part of the key: raise it when what is derived changes
MODEL = "tokenizer.ggml.model"
TEMPLATE = "tokenizer.chat_template"
TEMPLATE_OF_NAME = f"{TEMPLATE}."  # and a name: a template besides the one meant without a name


def has_vocabulary(path: Path) -> bool:
    """Whether a GGUF file holds a tokenizer; raises CheckpointError if it is no GGUF."""
    return TOKENS in read_header(first_part(path)).metadata


def tokenizer_of_gguf(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file; raises TokenizerError."""
    files = files_of_gguf(path)
    if JSON_FILE in files:
        try:
            return JsonTokenizer({name: content.decode() for name, content in files.items()}, path)
        except ImportError as error:
            raise TokenizerError(f"{path}: a byte-pair vocabulary needs `pip install tokenizers`") from error
    from llama_ref.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    folder = Path(tempfile.mkdtemp(prefix="llama-gguf-"))  # the library reads a file, and the cache may be taken away
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        tokenizer = SentencePieceTokenizer(folder / SENTENCEPIECE_FILE)
    except TokenizerError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _not_converted(path, f"sentencepiece refuses it: {error.__cause__ or error}") from error
    weakref.finalize(tokenizer, shutil.rmtree, folder, ignore_errors=True)
    return tokenizer


def files_of_gguf(path: Path) -> dict[str, bytes]:
    """File name -> content of tokenizer_config.json and tokenizer.json or tokenizer.model; raises TokenizerError."""
    path = first_part(path)  # of a model in several parts, which holds the metadata
    header = read_header(path)
    if TOKENS not in header.metadata:
        raise TokenizerError(f"{path}: holds no tokenizer")
    name = SENTENCEPIECE_FILE if header.metadata.get(MODEL) == SENTENCEPIECE else JSON_FILE
    cached = cache_folder() / "tokenizers" / f"{header.fingerprint[:32]}-{CONVERSION}"
    try:
        files = _files(header, cached, name)
        _warn(header.metadata)
    except ValueError as error:
        raise _not_converted(path, str(error)) from error
    return files


def _files(header: Header, cached: Path, name: str) -> dict[str, bytes]:
    """From the cache, else derived; ValueError names the field that stands in the way."""
    with contextlib.suppress(OSError):
        return {file: (cached / file).read_bytes() for file in (name, SETTINGS_FILE)}
    content, settings = _convert(header.metadata), settings_of(header.metadata)
    if name == SENTENCEPIECE_FILE:
        settings["added_tokens_decoder"] = added_tokens(read_vocabulary(header.metadata))
    files = {
        name: content if isinstance(content, bytes) else content.encode(),
        SETTINGS_FILE: (json.dumps(settings, indent=2) + "\n").encode(),
    }
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a second, not the answer
        store(cached, files)
    return files


def settings_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer_config.json that a GGUF's metadata amounts to. Where it does not say whether texts start with BOS,
    llama.cpp's defaults hold: sentencepiece vocabularies and Llama 3's do, most byte-pair ones do not."""
    tokens = metadata[TOKENS]
    kind = metadata.get(MODEL)
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if kind == SENTENCEPIECE else "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(metadata),
    }
    for role in ("bos", "eos"):
        token = role_id(metadata, role, len(tokens))
        if token is not None:
            settings[f"{role}_token"] = tokens[token]
    named = {
        name.removeprefix(TEMPLATE_OF_NAME): text
        for name, text in metadata.items()
        if name.startswith(TEMPLATE_OF_NAME)
    }
    template = metadata.get(TEMPLATE)
    for name, text in {
        TEMPLATE: template or "",
        **{f"{TEMPLATE_OF_NAME}{name}": text for name, text in named.items()},
    }.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} is no text")
    if template:
        settings["chat_template"] = {"default": template} | named if named else template
    elif named:
        settings["chat_template"] = named
    if kind == SENTENCEPIECE:
        settings["legacy"] = True  # the leading space comes after every special token, as in llama.cpp
        if not adds_space(metadata):
            settings["add_prefix_space"] = False
    return settings


def _warn(metadata: Mapping[str, Any]) -> None:
    """Warn of what the file leaves open, and of what it asks for in vain."""
    warn_of_ids(metadata, len(metadata[TOKENS]))
    if metadata.get(MODEL) == SENTENCEPIECE and metadata.get(SCORES) is None:
        warnings.warn(
            f"{SCORES} is missing: pieces are joined from the left, which may not suit the model", stacklevel=2
        )
    if metadata.get(KINDS) is None:
        warnings.warn(f"{KINDS} is missing: only tokens that are known by their text are special", stacklevel=2)
    if metadata.get(MODEL) == BYTE_PAIR and not metadata.get(PRE):
        warnings.warn(f"{PRE} is missing: texts are cut as by 'default', which may not suit the model", stacklevel=2)
    if flag(metadata, "tokenizer.ggml.add_eos_token"):
        warnings.warn("tokenizer.ggml.add_eos_token is ignored: EOS behind a prompt would end it", stacklevel=2)


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """As the file says, else as its kind of vocabulary does; ValueError for a pre-tokenizer that is not known."""
    usual = metadata.get(MODEL) == SENTENCEPIECE
    if metadata.get(MODEL) == BYTE_PAIR:
        usual = pretokenizer_of(metadata).adds_bos
    return flag(metadata, "tokenizer.ggml.add_bos_token", usual)


def _convert(metadata: Mapping[str, Any]) -> str | bytes:
    """The text of a tokenizer.json, or the bytes of a tokenizer.model; ValueError names the field."""
    kind = metadata.get(MODEL)
    if kind not in (BYTE_PAIR, SENTENCEPIECE):
        raise ValueError(f"{MODEL}={kind!r} is not supported (known: {BYTE_PAIR}, {SENTENCEPIECE})")
    vocabulary = read_vocabulary(metadata)
    if kind == SENTENCEPIECE:
        return sentencepiece_model(metadata, vocabulary)
    lead = role_id(metadata, "bos", len(vocabulary.tokens)) if _adds_bos(metadata) else None
    return byte_pair_json(metadata, vocabulary, lead)


def _not_converted(path: Path, reason: str) -> TokenizerError:
    return TokenizerError(f"{path}: its tokenizer could not be converted ({' '.join(reason.split())[:200]})")

"""Llama 3's `tokenizer.model` as Meta ships it: a line "base64 rank" per token. It becomes a tokenizer.json, once.

The file holds no pattern and no special tokens: these are Llama 3's own, 256 ids behind the last rank.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import Any

from llama_ref.cache_folder import cache_folder, store
from llama_ref.tokenizers.chat_templates import template_files
from llama_ref.tokenizers.tokenizer_files import (
    COMPANIONS,
    JSON_FILE,
    SETTINGS_FILE,
    TokenizerError,
    read_json_object,
    read_texts,
)

CONVERSION = 1  # part of the cache's key: raise it when what is derived changes
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NAMED_SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
    *("<|eot_id|>", "<|python_tag|>", "<|image|>"),
)
SPECIALS = (*NAMED_SPECIALS, *(f"<|reserved_special_token_{i}|>" for i in range(2, 258 - len(NAMED_SPECIALS))))
LONGEST_TOKEN_BYTES = 1024  # Llama 3's is 128; cutting a token everywhere is quadratic in its length


def is_tiktoken(path: Path) -> bool:
    """Whether a tokenizer.model starts as tiktoken's text format does; sentencepiece's is binary."""
    with path.open("rb") as file:
        parts = file.readline(4096).split()
    return len(parts) == 2 and parts[1].isdigit() and _token(parts[0]) is not None


def files_of_tiktoken(path: Path) -> dict[str, str]:
    """File name -> text of tokenizer.json and what stands beside it; raises TokenizerError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: not readable ({error})") from error
    cached = cache_folder() / "tokenizers" / f"{hashlib.sha256(content).hexdigest()[:32]}-tiktoken-{CONVERSION}"
    files = read_texts(path.parent, COMPANIONS) | template_files(path.parent)
    stated = read_json_object(files.get(SETTINGS_FILE, "{}"), path.with_name(SETTINGS_FILE))
    files[SETTINGS_FILE] = json.dumps(SETTINGS | stated, indent=2) + "\n"
    try:
        return {JSON_FILE: (cached / JSON_FILE).read_text(encoding="utf-8"), **files}
    except (OSError, UnicodeDecodeError):
        import contextlib

        text = _backend(_ranks(content, path)).to_str()
        with contextlib.suppress(OSError):  # a cache that cannot be written costs seconds, not the answer
            store(cached, {JSON_FILE: text})
        return {JSON_FILE: text, **files}


SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": True,
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
}


def _ranks(content: bytes, path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split()
        token = _token(parts[0]) if len(parts) == 2 and parts[1].isdigit() and len(parts[1]) < 10 else None
        if not token or token in ranks or len(token) > LONGEST_TOKEN_BYTES:
            raise TokenizerError(f"{path}: line {number} is no token and rank of a tiktoken file")
        ranks[token] = int(parts[1])
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{path}: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{path}: no token for {len(missing)} of the 256 bytes, the first {missing[0]}")
    return ranks


def _token(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _backend(ranks: dict[bytes, int]) -> Any:
    """tiktoken joins whichever two neighbours make the token of the lowest rank: so every cut of a token is a merge."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    spelled = {byte: chr(point) for byte, point in byte_alphabet().items()}
    texts = {token: "".join(spelled[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += [(texts[left], texts[right]) for left, right in cuts if left in ranks and right in ranks]
    vocabulary = {text: ranks[token] for token, text in texts.items()}
    backend: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return backend


def byte_alphabet() -> dict[int, int]:
    """Byte-level vocabularies spell a byte as itself where that is a visible character, else from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: byte for byte in visible} | {byte: 0x100 + i for i, byte in enumerate(hidden)}

"""A sentencepiece vocabulary of a GGUF file as the `tokenizer.model` that it was made from.

GGUF keeps the pieces, their scores and kinds, and how spaces are treated. That is all of a model that the sentencepiece
library needs, so that library runs it. Layout: sentencepiece_model.proto (github.com/google/sentencepiece), whose
numbers for the kinds of pieces are those of GGUF.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

from llama_ref.formats.fields import flag
from llama_ref.formats.gguf_vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    role_id,
)

BPE = 2  # TrainerSpec.model_type
A_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
ABSENT = "\x00absent"  # names a role's piece that the vocabulary has not


def sentencepiece_model(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> bytes:
    """The bytes of a tokenizer.model; ValueError names the field that stands in the way."""
    size = len(vocabulary.tokens)
    roles = {role: role_id(metadata, role, size) for role in ("bos", "eos", "unknown")}
    kinds = _kinds(vocabulary, roles)
    bytewise = kinds.count(BYTE) == 256
    pieces = b"".join(
        _bytes(1, _text(1, text) + _float(2, score) + _number(3, kind))
        for text, score, kind in zip(vocabulary.tokens, vocabulary.scores, kinds)
    )
    named = {role: ABSENT if token is None else vocabulary.tokens[token] for role, token in roles.items()}
    trainer = _number(3, BPE) + _number(35, bytewise) + _text(45, named["unknown"])
    trainer += _text(46, named["bos"]) + _text(47, named["eos"]) + _text(48, ABSENT)
    normalizer = _text(1, "gguf") + _bytes(2, _charsmap(metadata))
    normalizer += _number(3, adds_space(metadata)) + _number(5, True)
    normalizer += _number(4, flag(metadata, "tokenizer.ggml.remove_extra_whitespaces"))
    return pieces + _bytes(2, trainer) + _bytes(3, normalizer)


def adds_space(metadata: Mapping[str, Any]) -> bool:
    """Whether a text gets a leading space before it is cut, which llama.cpp does unless the file says otherwise."""
    return flag(metadata, "tokenizer.ggml.add_space_prefix", True)


def added_tokens(vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """Tokens that are found in a text before sentencepiece sees it, in the spelling of a tokenizer_config.json.

    Those with sentencepiece's mark for a space are left to it, which knows them as whole pieces.
    """
    return {
        str(token): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": strips,
            "single_word": False,
            "special": kind == CONTROL,
        }
        for token, (text, kind, strips) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, vocabulary.strips))
        if kind == CONTROL or (kind == USER_DEFINED and SPACE not in text)
    }


def _kinds(vocabulary: Vocabulary, roles: Mapping[str, int | None]) -> list[int]:
    """Each piece's kind, such that sentencepiece finds one unknown piece, and all 256 bytes or none."""
    tokens, kinds = vocabulary.tokens, list(vocabulary.kinds)
    kinds = [kind if NORMAL <= kind <= BYTE else UNUSED for kind in kinds]
    unknown = roles["unknown"]
    if unknown is None:
        raise ValueError("no token is named as the unknown one")
    kinds = [CONTROL if kind == UNKNOWN else kind for kind in kinds]
    kinds[unknown] = UNKNOWN
    for role in ("bos", "eos"):
        token = roles[role]
        if token is not None and token != unknown:
            kinds[token] = CONTROL
    shaped = [token for token, text in enumerate(tokens) if A_BYTE.fullmatch(text)]
    for token, kind in enumerate(kinds):
        if kind == BYTE and not A_BYTE.fullmatch(tokens[token]):
            raise ValueError(f"token {token}, {tokens[token]!r}, is of the kind byte, and no byte")
    for token in shaped:
        kinds[token] = BYTE if len(shaped) == 256 else NORMAL
    return kinds


def _charsmap(metadata: Mapping[str, Any]) -> bytes:
    values = metadata.get("tokenizer.ggml.precompiled_charsmap", [])
    if not isinstance(values, list) or not all(type(value) is int and -128 <= value < 256 for value in values):
        raise ValueError("tokenizer.ggml.precompiled_charsmap is no array of bytes")
    return bytes(value % 256 for value in values)


# --- the wire format of protobuf: a key (field and type), then the value ---------------------------


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first: 300 -> b"\\xac\\x02"."""
    parts = []
    while value >= 128:
        parts.append(value % 128 + 128)
        value //= 128
    return bytes([*parts, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field * 8) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field * 8 + 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field * 8 + 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())

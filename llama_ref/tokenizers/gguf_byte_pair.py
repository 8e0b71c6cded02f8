"""A byte-pair vocabulary of a GGUF file as a tokenizer.json, which the `tokenizers` library runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_ref.formats.gguf_vocabulary import FOUND, USER_DEFINED, Vocabulary
from llama_ref.tokenizers.gguf_pretokenizers import DIGIT, PRETOKENIZERS, Pretokenizer

PRE = "tokenizer.ggml.pre"
MERGES = "tokenizer.ggml.merges"


def pretokenizer_of(metadata: Mapping[str, Any]) -> Pretokenizer:
    """By the name in the metadata, llama.cpp's default where there is none; ValueError for a name that is not known."""
    name = metadata.get(PRE) or "default"
    if not isinstance(name, str) or name not in PRETOKENIZERS:
        raise ValueError(f"{PRE}={name!r} is not supported: how it cuts a text into words is not known here")
    return PRETOKENIZERS[name]


def byte_pair_json(metadata: Mapping[str, Any], vocabulary: Vocabulary, lead: int | None) -> str:
    """The text of a tokenizer.json. `lead`: the id that starts every text, if one does. ValueError names the field."""
    pretokenizer = pretokenizer_of(metadata)
    ids = {text: token for token, text in enumerate(vocabulary.tokens)}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [_split(expression) for expression in pretokenizer.expressions]
    model = {
        "type": "BPE",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pretokenizer.whole_words,
        "vocab": ids,
        "merges": _merges(metadata, ids),
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(vocabulary),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, bytewise]},
        "post_processor": None if lead is None else _template(lead, vocabulary.tokens[lead]),
        "decoder": bytewise,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False)


def _split(expression: str) -> dict[str, Any]:
    if expression == DIGIT:  # what models with this rule were published with; it knows numerals of Unicode 17 too
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def _merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """["a b", ...] -> [("a", "b"), ...]. A left part may start with a space; it holds no other."""
    stated = metadata.get(MERGES)
    if not isinstance(stated, list):
        raise ValueError(f"{MERGES} is missing")
    merges = []
    for number, merge in enumerate(stated):
        at = merge.find(" ", 1) if isinstance(merge, str) else -1
        if at < 0:
            raise ValueError(f"{MERGES} holds {merge!r:.80}, which is no pair, at {number}")
        left, right = merge[:at], merge[at + 1 :]
        if left not in ids or right not in ids or left + right not in ids:
            raise ValueError(f"{MERGES} holds {merge!r:.80} at {number}, of which a part or the whole is no token")
        merges.append((left, right))
    return merges


def _added(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are found in a text before anything else, and those of them that are no text."""
    flags = {"single_word": False, "lstrip": False, "normalized": False}
    return [
        {"id": token, "content": text, **flags, "rstrip": strips, "special": kind != USER_DEFINED}
        for token, (text, kind, strips) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, vocabulary.strips))
        if kind in FOUND
    ]


def _template(token: int, text: str) -> dict[str, Any]:
    """What puts BOS before a text, and before each of a pair."""
    lead: dict[str, Any] = {"SpecialToken": {"id": text, "type_id": 0}}
    first: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": text, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    named = {text: {"id": text, "ids": [token], "tokens": [text]}}
    return {
        "type": "TemplateProcessing",
        "single": [lead, first],
        "pair": [lead, first, *second],
        "special_tokens": named,
    }

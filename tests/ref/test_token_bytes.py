"""The bytes of single tokens: joined, they are what the tokenizer decodes, for every kind of file and any run of tokens."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from llama_ref.tokenizers.contract import Tokenizer
from llama_ref.tokenizers.token_bytes import of_byte_fallback, of_byte_level, piece_decoder
from llama_ref.tokenizers.tokenizer import RandomTokenizer, load_tokenizer
from llama_ref.tokenizers.tokenizer_files import TokenizerError
from tests.ref.test_sentencepiece import LLAMA, NAMED, train
from tests.ref.test_tokenizer_witness import llama3, mistral

TEXTS = ('{"a": [1, -2.5e3], "é": "x\\n🙂"}', "  two  spaces\n\ttab", "naïve 漢字 <s> [INST] {}")
LLAMA_2 = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


def trained_json(directory: Path, **settings: Any) -> None:
    """A tokenizer.json of Llama 2's kind: pieces with a mark for the space, and tokens for bytes."""
    letters = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *'abcdefghijk{}":,1é',
        "▁a",
        "▁▁",
    ]
    special = [{"id": i, "content": word, "special": True} for i, word in enumerate(letters[:3])]
    special += [{"id": len(letters), "content": "<call>", "special": False}]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    model = {"type": "BPE", "vocab": {word: i for i, word in enumerate(letters)}, "merges": [["▁", "a"], ["▁", "▁"]]}
    content = {
        "version": "1.0",
        "added_tokens": [{**token, **flags} for token in special],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": LLAMA_2},
        "model": {**model, "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content | settings))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **NAMED})
    )


def tokenizer(kind: str, directory: Path) -> Tokenizer:
    if kind == "trained sentencepiece":
        train(directory, **LLAMA)
        (directory / "tokenizer_config.json").write_text(json.dumps(NAMED))
    elif kind == "llama 2's json":
        trained_json(directory)
    else:
        files = {"mistral v1": lambda: mistral("v1"), "mistral v3": lambda: mistral("v3"), "llama 3": llama3}
        shutil.copy(files[kind](), directory / "tokenizer.model")
    return load_tokenizer(directory)


@pytest.mark.parametrize("kind", ["trained sentencepiece", "llama 2's json", "mistral v1", "mistral v3", "llama 3"])
def test_bytes_joined_are_what_is_decoded_and_special_tokens_have_none(kind: str, tmp_path: Path) -> None:
    """Every token behind another one, runs of random tokens, and texts that were cut into tokens. Every byte has a token."""
    found = tokenizer(kind, tmp_path)
    known = found.token_bytes()
    anchor = found.encode("a", bos=False)[-1:]
    before = found.decode(anchor)
    shown = [token for token, content in enumerate(known) if content]
    generator = random.Random(5)
    runs = [[token] for token in (shown if len(shown) < 2000 else generator.sample(shown, 2000))]
    runs += [generator.choices(shown, k=6) for _ in range(500)]
    whole = 0
    for run in runs:
        joined = b"".join(known[token] or b"" for token in run)
        try:
            text = joined.decode()
        except UnicodeDecodeError:
            continue  # what is decoded of half a character is no text
        whole += 1
        assert found.decode(anchor + run) == before + text, run
    assert whole > len(runs) / 5
    for text in TEXTS:
        ids = found.encode(text, bos=False)
        joined = b"".join(known[token] or b"" for token in ids)
        if None not in [known[token] for token in ids]:
            assert joined.decode() in (text, " " + text)
    for word in found.special_tokens.values():
        (token,) = found.encode(word, bos=False)
        assert known[token] is None
    assert len(known) >= found.vocab_size
    assert {content[0] for content in known if content and len(content) == 1} == set(range(256))


def test_a_token_that_was_added_as_text_has_bytes(tmp_path: Path) -> None:
    found = tokenizer("llama 2's json", tmp_path)
    (token,) = found.encode("<call>", bos=False)
    assert found.token_bytes()[token] == b"<call>"


def test_pieces_are_decoded_by_their_rules() -> None:
    assert of_byte_level("Ġaé".encode()) == b" a\xe9"  # each letter is a byte
    assert of_byte_level("Ġ漢".encode()) == "Ġ漢".encode()  # no letter of that alphabet: an added token
    assert of_byte_fallback(b"<0x0A>") == b"\n" and of_byte_fallback(b"<0x0A> ") == b"<0x0A> "
    assert piece_decoder({"type": "Metaspace", "replacement": "▁"})("▁a▁".encode()) == b" a "


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (None, "no decoder"),
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"),
        ({"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]}, "Strip"),
        ({"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}, "Replace"),
    ],
)
def test_a_decoder_that_is_not_known_is_refused_by_name(decoder: Any, named: str, tmp_path: Path) -> None:
    trained_json(tmp_path, decoder=decoder)
    with pytest.raises(TokenizerError, match=rf"tokenizer.json: .*{named}"):
        load_tokenizer(tmp_path).token_bytes()


def test_a_random_model_has_no_text() -> None:
    with pytest.raises(TokenizerError, match="no language"):
        RandomTokenizer(9, None, ()).token_bytes()

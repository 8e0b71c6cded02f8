"""The `tokenizer_class` that a checkpoint names, as far as ids depend on it.

transformers 5 takes a tokenizer.json as it stands only for the class `PreTrainedTokenizerFast` and for classes that it
does not know. Its `LlamaTokenizer` takes the vocabulary, the merges and what is put around a text from that file, and
cuts words by `legacy` and `add_prefix_space` of tokenizer_config.json. So does this file. Two cases stay as tokenizer.json
has them: byte-level vocabularies, as Llama 3's, and the class a Mistral's config.json stands for (both as in transformers).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_ref.formats.fields import stated
from llama_ref.tokenizers.tokenizer_files import JSON_FILE, SETTINGS_FILE, beside, read_json_object

GENERIC = "PreTrainedTokenizerFast"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's mark for a space
_OF_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_INFILLING = {name: f"{SPACE}<{name[:3].upper()}>" for name in ("prefix_token", "middle_token", "suffix_token")}
_OF_CODE_LLAMA = {**_INFILLING, "eot_token": f"{SPACE}<EOT>", "fill_token": "<FILL_ME>"}
DEFAULTS: dict[str, dict[str, str]] = {
    GENERIC: {},
    "LlamaTokenizer": _OF_LLAMA,
    "CodeLlamaTokenizer": _OF_LLAMA | _OF_CODE_LLAMA,
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}
"""Class -> its special tokens where no file states or denies them."""

PLAIN_MERGES = {"type": "BPE", "fuse_unk": True, "byte_fallback": True}


def class_of(files: Mapping[str, str], config: Mapping[str, Any], where: object) -> str:
    """One of DEFAULTS: "LlamaTokenizerFast" -> "LlamaTokenizer". `config` is the content of config.json, or {}."""
    if config.get("model_type") == "mistral":
        return GENERIC
    settings = read_json_object(files.get(SETTINGS_FILE, "{}"), beside(where, SETTINGS_FILE))
    stated = settings.get("tokenizer_class") or config.get("tokenizer_class")
    name = stated.removesuffix("Fast") if isinstance(stated, str) else GENERIC
    if name == "LlamaTokenizer" and '"ByteLevel"' in files.get(JSON_FILE, ""):
        return GENERIC
    return name if name in DEFAULTS else GENERIC


def with_class(files: Mapping[str, str], name: str, where: object) -> dict[str, str]:
    """The files such that `class_of` finds `name` in them without a config.json."""
    if class_of(files, {}, where) == name:
        return dict(files)
    settings = read_json_object(files.get(SETTINGS_FILE, "{}"), beside(where, SETTINGS_FILE))
    return {**files, SETTINGS_FILE: json.dumps(settings | {"tokenizer_class": name}, indent=2) + "\n"}


def prefixes_every_stretch(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether every stretch between added tokens gets a leading space (`legacy`), or only the first of a text."""
    if name == "CodeLlamaTokenizer":
        return False
    legacy = settings.get("legacy", name != "LlamaTokenizer")
    return bool(legacy)


def as_the_class_reads(text: str, data: dict[str, Any], name: str, settings: Mapping[str, Any]) -> str:
    """A tokenizer.json, whose JSON is `data`, in which words are cut as its class says; the file's own text where the class
    says nothing."""
    if name == GENERIC:
        return text
    if name == "GPT2Tokenizer":
        return _as_gpt2_reads(text, data, settings)
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        return text  # a unigram vocabulary: the class is for merges
    unknown = DEFAULTS[name]["unk_token"] if name == "CodeLlamaTokenizer" else None
    prefix = bool(stated(settings.get("add_prefix_space"), True))
    scheme = "never" if not prefix else "always" if prefixes_every_stretch(name, settings) else "first"
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix or name == "CodeLlamaTokenizer":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    data = data | {
        "model": PLAIN_MERGES | {"unk_token": unknown, "vocab": model["vocab"], "merges": model["merges"]},
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "added_tokens": [],
    }
    return json.dumps(data, ensure_ascii=False)


def _as_gpt2_reads(text: str, data: dict[str, Any], settings: Mapping[str, Any]) -> str:
    """Only the leading space is taken from the settings: SmolLM2 names this class too, and cuts its digits first."""
    cut = data.get("pre_tokenizer")
    if not isinstance(cut, dict) or cut.get("type") != "ByteLevel":
        return text
    cut = cut | {"add_prefix_space": bool(settings.get("add_prefix_space"))}
    return json.dumps(data | {"pre_tokenizer": cut}, ensure_ascii=False)

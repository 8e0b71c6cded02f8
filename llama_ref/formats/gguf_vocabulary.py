"""The vocabulary of a GGUF file: its tokens, what kind each is, and the ids with a role, by llama.cpp's rules.

Source of the rules: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp (October 2026). A file may leave out what that
program then takes from the kind of the vocabulary, or from a token's text.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOKENS = "tokenizer.ggml.tokens"
SCORES = "tokenizer.ggml.scores"
KINDS = "tokenizer.ggml.token_type"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
FOUND = (UNKNOWN, CONTROL, USER_DEFINED)  # before anything else of a text is cut
SENTENCEPIECE, BYTE_PAIR = "llama", "gpt2"  # tokenizer.ggml.model
DEFAULT_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # of sentencepiece vocabularies

ENDS = (  # tokens that end a turn or a text by their text alone
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
)
INFILL_ENDS = {  # so do these, of which a file may name another by its id
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
ROLES = ("bos", "eos", "eot", "eom", "unknown", *INFILL_ENDS)
INFILL_MARKS = (
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
    *("<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
    *("<|code_suffix|>", "<|suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>"),
    *("▁<MID>", "<|code_middle|>", "<|middle|>"),
)
PHI_KEEPS = ("<unk>", "<s>", "<|endoftext|>")  # Phi-3's other special tokens swallow the whitespace behind them
SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss: part of what a reader is to see


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, each with its kind (NORMAL to BYTE) and its score (0.0 where the file states none).

    `strips`: whether a token that is found in a text takes the whitespace behind it along.
    """

    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    strips: tuple[bool, ...]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Check and read what the metadata says of each token; ValueError names the field."""
    texts = _listed(metadata, TOKENS, str)
    tokens = tuple(text or f"[EMPTY_{token}]" for token, text in enumerate(texts))
    ids: dict[str, int] = {}
    for token, text in enumerate(tokens):
        if ids.setdefault(text, token) != token:
            raise ValueError(f"{TOKENS} holds {text!r} twice, as {ids[text]} and as {token}")
    kinds = _listed(metadata, KINDS, int, len(tokens), NORMAL)
    scores = [float(score) for score in _listed(metadata, SCORES, float, len(tokens), 0.0)]
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(f"{SCORES} holds what is no number")
    for text in (*ENDS, *INFILL_MARKS, *(text for texts in INFILL_ENDS.values() for text in texts)):
        if text in ids:
            kinds[ids[text]] = CONTROL
    for text in (*SHOWN, *_no_ends(tokens)):
        if text in ids:
            kinds[ids[text]] = USER_DEFINED
    for text in _normal_s(tokens):
        kinds[ids[text]] = NORMAL
    name = str(metadata.get("general.name", "")).lower()
    phi = "phi-3" in name or "phi3" in name  # the one family for which llama.cpp knows what GGUF does not state
    strips = tuple(phi and kind in FOUND and text not in PHI_KEEPS for text, kind in zip(tokens, kinds))
    return Vocabulary(tokens, tuple(kinds), tuple(scores), strips)


def role_id(metadata: Mapping[str, Any], role: str, size: int) -> int | None:
    """The id that the file gives a role ("bos", "eos", "eot", ...), else the one that its kind of vocabulary has.

    An id outside the vocabulary of `size` tokens, as some converters write for "none", counts as not given.
    """
    token = _stated_id(metadata, role)
    if token is not None and 0 <= token < size:
        return token
    default = DEFAULT_IDS.get(role) if metadata.get("tokenizer.ggml.model") == SENTENCEPIECE else None
    return default if default is not None and default < size else None


def warn_of_ids(metadata: Mapping[str, Any], size: int) -> None:
    """Warn of every id with a role that is outside the vocabulary, and say what counts in its place."""
    for role in ROLES:
        token = _stated_id(metadata, role)
        if token is not None and not 0 <= token < size:
            taken = role_id(metadata, role, size)
            instead = "ignored" if taken is None else f"{taken} is used, as where the file names none"
            warnings.warn(
                f"tokenizer.ggml.{role}_token_id={token} is outside the vocabulary of {size} tokens: {instead}",
                stacklevel=2,
            )


def end_ids(metadata: Mapping[str, Any], size: int) -> tuple[int, ...]:
    """All ids below `size` that end a text or a turn: those the file names first, then those told by their text."""
    tokens = metadata.get(TOKENS) or ()
    tokens = tokens[:size] if isinstance(tokens, (list, tuple)) else ()
    ids = {text: token for token, text in enumerate(tokens) if isinstance(text, str)}
    named = [role_id(metadata, role, size) for role in ("eos", "eot", "eom", *INFILL_ENDS)]
    told = [ids[text] for text in ENDS if text in ids]
    for role, texts in INFILL_ENDS.items():
        if metadata.get(f"tokenizer.ggml.{role}_token_id") is None:
            told += [ids[text] for text in texts if text in ids][:1]
    never = {ids[text] for text in (*_no_ends(tokens), *_normal_s(tokens)) if text in ids}
    return tuple(dict.fromkeys(token for token in (*named, *told) if token is not None and token not in never))


def _stated_id(metadata: Mapping[str, Any], role: str) -> int | None:
    token = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
        raise ValueError(f"tokenizer.ggml.{role}_token_id={token!r} must be a token id")
    return token


def _no_ends(tokens: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """<|end|> ends only a part of a reply where other tokens end the whole of it (gpt-oss, Solar)."""
    present = set(tokens) if "<|end|>" in tokens else set()
    calls = bool(present & {"<|call|>", "<|calls|>"})
    return ("<|end|>",) if calls and present & {"<|return|>", "<|flush|>"} else ()


def _normal_s(tokens: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """</s> is text beside Gemma 4's own tokens."""
    return ("</s>",) if "<|tool_response>" in tokens and "</s>" in tokens else ()


def _listed(metadata: Mapping[str, Any], name: str, kind: type, least: int = 0, default: Any = None) -> list[Any]:
    """An array of the metadata; without one, `least` times the default. ValueError if it is another thing, or shorter."""
    values = metadata.get(name)
    if values is None and default is not None:
        return [default] * least
    wanted = (int, float) if kind is float else kind
    if not isinstance(values, list) or not all(isinstance(v, wanted) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{name} is no array of {kind.__name__}")
    if len(values) < least:
        raise ValueError(f"{name} holds {len(values)} values for {least} tokens")
    return list(values[:least] if least else values)

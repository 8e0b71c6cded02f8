"""Single tokens as text, for log-probabilities and stop ids."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

from llama_fast.engine.logprobs import TokenLogprob
from llama_fast.engine.request import Writer
from llama_fast.engine.text import UNFINISHED
from llama_ref.tokenizers.contract import Tokenizer

LEAST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI's stand-in for minus infinity."""


class Spelling:
    """How tokens are spelled inside a text: with the space that leads a word, and special tokens by their names."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a", bos=False)[-1:]
        self._before = tokenizer.decode(self._anchor, skip_special_tokens=False)
        self.of = lru_cache(maxsize=65536)(self._of)

    def _of(self, token: int) -> str:
        """The token's text; "token_id:5" for one that is a part of a character, whose text alone would be unreadable."""
        text = self._tokenizer.decode([*self._anchor, token], skip_special_tokens=False)
        text = text[len(self._before) :] if text.startswith(self._before) else text
        return f"token_id:{token}" if UNFINISHED in text else text


class EndingWriter:
    """A writer that shows nothing of the stop id that ends its row."""

    def __init__(self, writer: Writer, stop_ids: Collection[int]):
        self._writer, self._stop_ids = writer, frozenset(stop_ids)

    @property
    def stopped(self) -> bool:
        return self._writer.stopped

    def push(self, token: int) -> str:
        """The text that a token completes; none of a stop id."""
        return "" if token in self._stop_ids else self._writer.push(token)

    def finish(self) -> str:
        """The text that was held back."""
        return self._writer.finish()


def number(logprob: float) -> float | None:
    """A log-probability that JSON can hold: -inf -> -9999.0, NaN -> None."""
    return None if logprob != logprob else max(logprob, LEAST_LOGPROB)


class CompletionLogprobs:
    """The `logprobs` of /v1/completions: four lists, an entry for each token."""

    def __init__(self, spelling: Spelling, top: int):
        self._spelling, self._top = spelling, top
        self.offset = 0
        """Characters of the text that was told before."""

    def of(self, told: list[TokenLogprob | int], text: str) -> dict[str, Any]:
        """Entries for some tokens and the text that they completed. A bare id is a text's first token: it has none."""
        tokens = [self._spelling.of(one if isinstance(one, int) else one.token) for one in told]
        offsets, at = [], 0
        for token in tokens:
            offsets.append(self.offset + at)
            # a special token is not in the text, nor is the space of a text's first word
            shown = next((one for one in (token, token.lstrip(" ")) if one and text.startswith(one, at)), "")
            at += len(shown)
        self.offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [None if isinstance(one, int) else number(one.logprob) for one in told],
            "top_logprobs": [None if isinstance(one, int) else self._likeliest(one) for one in told],
            "text_offset": offsets,
        }

    def _likeliest(self, one: TokenLogprob) -> dict[str, float | None]:
        """The likeliest tokens and the chosen one, by their texts; of two that are spelled alike the likelier."""
        found: dict[str, float | None] = {}
        for token, logprob in [*list(one.top.items())[: self._top], (one.token, one.logprob)]:
            found.setdefault(self._spelling.of(token), number(logprob))
        return found


def chat_logprobs(spelling: Spelling, one: TokenLogprob, top: int) -> dict[str, Any]:
    """The `logprobs` of /v1/chat/completions for one token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = spelling.of(token)
        known = not text.startswith("token_id:")
        return {"token": text, "logprob": number(logprob), "bytes": list(text.encode()) if known else None}

    likeliest = [entry(token, logprob) for token, logprob in list(one.top.items())[:top]]
    return {**entry(one.token, one.logprob), "top_logprobs": likeliest}

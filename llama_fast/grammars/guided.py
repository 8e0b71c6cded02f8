"""Grammars over a model's tokens, by llguidance: which tokens may come next is worked out on the host, before each choice.

A text is complete when an EOS id is chosen, which the grammar allows where the text is one of its own, or when nothing else
could follow. What the library refuses, or gives up, is told in its own words, in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from llama_fast.engine.guides import Constraint, Guide
from llama_fast.grammars.asked import Grammar, library
from llama_ref.tokenizers.contract import Tokenizer

ALL = -1
"""A word in which every bit is set."""


class Tokens:
    """The tokens of a model, made ready for any grammar, once: in a second or two for the 128,000 of Llama 3."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Collection[int]):
        """Raises ValueError where the package is missing, or the tokenizer's tokens are not known as bytes."""
        made_by = library()
        if not eos_ids:
            raise ValueError("a grammar needs an end: the model's config names no EOS id")
        self.ends = tuple(sorted(eos_ids))
        known = [*tokenizer.token_bytes()[:vocab_size]]
        known += [None] * (vocab_size - len(known))  # a model's table may be padded
        wrapped = made_by.TokenizerWrapper(_Wrapped(tokenizer, known, self.ends))
        self.tokenizer = made_by.LLTokenizer(wrapped, n_vocab=vocab_size, eos_token=list(self.ends))


class _Wrapped:
    """What llguidance wants to know of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, known: Sequence[bytes | None], ends: Sequence[int]):
        self._tokenizer = tokenizer
        self.eos_token_id = ends[0]
        # no text matches a special token, whatever its name
        self.special_token_ids = [i for i, content in enumerate(known) if content is None or i in ends]
        self.tokens = [content or b"" for content in known]
        for i in self.special_token_ids:
            self.tokens[i] = f"<|special {i}|>".encode()

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace"), bos=False)


class Constrained:
    """A grammar over a model's tokens; a `Constraint`."""

    def __init__(self, grammar: Grammar, tokens: Tokens, again: Callable[[Grammar], Constraint] | None = None):
        """Raises ValueError, with the library's reason, for a grammar that is wrong, too large, or not supported.

        `again` makes it in another process, where it is pickled as its grammar.
        """
        self.ends, self._grammar, self._again = tokens.ends, grammar, again
        made_by, written = library(), grammar.written()
        is_wrong, messages = made_by.LLMatcher.validate_grammar_with_warnings(written, tokens.tokenizer)
        if is_wrong or messages:
            raise ValueError(one_line(messages[0] if messages else "it is refused"))
        self._matcher = made_by.LLMatcher(tokens.tokenizer, written, log_level=0)
        if self._matcher.is_error():
            raise ValueError(one_line(self._matcher.get_error()))

    def __reduce__(self) -> tuple[Callable[[Grammar], Constraint], tuple[Grammar]]:
        if self._again is None:
            raise TypeError("a grammar over tokens cannot be pickled unless it is known how to make it again")
        return self._again, (self._grammar,)

    def begin(self) -> Guide:
        return Guided(self._matcher.deep_copy())


class Guided:
    """A row's way through a grammar; a `Guide`."""

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self.failure: str | None = None

    @property
    def complete(self) -> bool:
        return self.failure is None and bool(self._matcher.is_stopped())

    def allow(self, words_W: Tensor) -> None:
        assert words_W.is_contiguous()
        self._matcher.unsafe_compute_mask_ptr(words_W.data_ptr(), words_W.numel() * words_W.element_size())
        if self._matcher.is_error():
            self.failure = one_line(self._matcher.get_error())
        elif not words_W.any():
            self.failure = "the model has no token for what must come next"
        if self.failure is not None:
            words_W.fill_(ALL)  # a token is chosen all the same, and ends the row

    def take(self, token: int) -> None:
        if self.failure is None and not self._matcher.consume_token(token):
            self.failure = one_line(self._matcher.get_error())


def one_line(said: str) -> str:
    """The library's words without line breaks and states: "regex parse error:\\n   (" -> "regex parse error: ("."""
    return " ".join(said.split("<state>")[0].split())[:300] or "it is refused"

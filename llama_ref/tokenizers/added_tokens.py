"""Added tokens: text that is always one id, found before the rest is cut into pieces.

The rules are those of Hugging Face's `tokenizers`: of the tokens that start at one place the longest is meant; one for
whole words does not count inside a word; and one may swallow the white space before or after it. A token that is not
`normalized` is looked for first, the others in what is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AddedToken:
    """`special`: no part of the text that a reader is shown. `lstrip`, `rstrip`: swallows the space before, after it."""

    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


def token_as_stated(stated: Any, special: bool = False) -> AddedToken | None:
    """A token as files spell it, "<s>" or {"content": "<s>", "lstrip": false, ...}; None if it is neither.

    `special` holds where the object does not say. A token is normalized unless it is special, or says otherwise.
    """
    if isinstance(stated, str):
        return AddedToken(stated, special=True)
    if not isinstance(stated, dict) or not isinstance(stated.get("content"), str):
        return None
    special = bool(stated.get("special", special))
    normalized = stated.get("normalized")
    return AddedToken(
        stated["content"],
        special=special,
        single_word=bool(stated.get("single_word")),
        lstrip=bool(stated.get("lstrip")),
        rstrip=bool(stated.get("rstrip")),
        normalized=not special if normalized is None else bool(normalized),
    )


class AddedTokens:
    """Added tokens with their ids: {"<s>": 1, "</s>": 2} cuts "<s>a</s>" into 1, "a", 2."""

    def __init__(self, tokens: Mapping[AddedToken, int]) -> None:
        self.ids = {token.content: index for token, index in tokens.items()}
        self._find = [
            _finder({token.content: token for token in tokens if token.normalized == normalized and token.content})
            for normalized in (False, True)
        ]

    def cut(self, text: str) -> Iterator[int | tuple[str, bool]]:
        """Ids, and between them stretches of other text, each with whether the whole text starts with it."""
        first_pass, second_pass = self._find
        for stretch, start, index in self._pieces(first_pass, text):
            if index is not None:
                yield index
                continue
            for part, inner_start, inner_index in self._pieces(second_pass, stretch):
                yield (part, start + inner_start == 0) if inner_index is None else inner_index

    def _pieces(self, find: Finder, text: str) -> Iterator[tuple[str, int, int | None]]:
        """What a pass makes of a text: (stretch, where it starts, None), and ("", where, id) for a token."""
        end = 0
        for start, stop, token in find(text):
            start = max(start, end)
            if token.lstrip and start >= stop:  # white space that the token before it has swallowed
                continue
            if start > end:
                yield text[end:start], end, None
            yield "", start, self.ids[token.content]
            end = max(end, stop)
        if end < len(text):
            yield text[end:], end, None


Finder = Callable[[str], Iterator[tuple[int, int, AddedToken]]]


def _finder(tokens: Mapping[str, AddedToken]) -> Finder:
    """Finds tokens in a text, as (start, stop, token), with the white space that they swallow."""
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(content) for content in longest_first) or r"(?!)")

    def find(text: str) -> Iterator[tuple[int, int, AddedToken]]:
        for match in pattern.finditer(text):
            start, stop = match.span()
            token = tokens[match[0]]
            if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])):
                continue
            if token.lstrip:
                start = len(text[:start].rstrip())
            if token.rstrip:
                stop = len(text) - len(text[stop:].lstrip())
            yield start, stop, token

    return find


def _is_word(character: str) -> bool:
    return re.fullmatch(r"\w", character) is not None

"""What followed the last few tokens when they stood in a text before: proposals without a model (prompt lookup)."""

from __future__ import annotations

from collections.abc import Iterable


class Text:
    """Tokens as they come, and where each run of `shortest` to `longest` of them was seen last."""

    def __init__(self, shortest: int, longest: int):
        self._lengths = range(shortest, longest + 1)
        self._tokens: list[int] = []
        # a run -> the index of its last token, where it stood before the text's end
        self._ends: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """Each costs a few dictionary entries; the length of the text does not matter."""
        for token in tokens:
            end = len(self._tokens) - 1
            for n in self._lengths:
                if n <= end + 1:
                    self._ends[tuple(self._tokens[end + 1 - n :])] = end
            self._tokens.append(token)

    def match(self) -> tuple[int, int]:
        """(length, index of its last token) of the latest of the longest runs that the text also ends with; (0, -1): none."""
        for n in reversed(self._lengths):
            end = self._ends.get(tuple(self._tokens[-n:]))
            if end is not None:
                return n, end
        return 0, -1

    def following(self, k: int) -> list[int]:
        """The k tokens after the match; zeros where there is none.

        After 7 8 9 4 7 8, k=2: the 7 8 at the start matches, and 9 4 followed. A match that overlaps the end goes on as a
        cycle: 1 2 1 2 is followed by 1 2 1 2 ...
        """
        n, end = self.match()
        if not n:
            return [0] * k
        cycle = len(self._tokens) - 1 - end
        return [self._tokens[end + 1 + i % cycle] for i in range(k)]

"""Which pages of a pool are free, which rows hold the others, and what pages hold that nobody has thrown away yet.

A full page is known by its tokens and by the page before it, so that one that is found holds the keys and values of exactly these
tokens behind exactly those. Pages of rows that have ended are kept until they are needed, those unused for the longest first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

Content = tuple[int, tuple[int, ...]]
"""The number of the content before this one (0: a text's beginning), and a page's tokens. Numbers are never used again."""


class Pages:
    """The pages 1 to `count` of a pool, each of `size` tokens. Every page is free, kept, or held by at least one row."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.holders = [0] * (count + 1)
        self._free = list(range(count, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Pages that no row holds and whose content is known, unused for the longest first."""
        self._known: dict[Content, tuple[int, int]] = {}
        """The page, and the number, of each content."""
        self._content: dict[int, Content] = {}
        self._numbers = 0

    @property
    def available(self) -> int:
        """Pages that can be taken: the free ones, and the kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        return len(self._kept)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The pages that hold the beginning of these tokens, as far as full pages are known."""
        found: list[int] = []
        before = 0
        for part in self._parts(tokens):
            known = self._known.get((before, part))  # which compares the tokens, and not their hash alone
            if known is None:
                break
            page, before = known
            found.append(page)
        return found

    def learn(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """These pages hold these tokens. Content that another page is known to hold stays that page's."""
        before = 0
        for part, page in zip(self._parts(tokens), pages):
            content = before, part
            if content not in self._known:
                self._numbers += 1
                number = self._numbers
                if page in self._content:  # known behind a page that is forgotten, whose content this row has once more
                    number = self._known.pop(self._content[page])[1]
                self._known[content], self._content[page] = (page, number), content
            before = self._known[content][1]

    def hold(self, pages: Sequence[int]) -> None:
        """One more row holds these pages."""
        for page in pages:
            assert self.holders[page] or page in self._kept
            self._kept.pop(page, None)
            self.holders[page] += 1

    def take(self, count: int) -> list[int]:
        """So many pages for one row, of free ones or of those kept unused for the longest, which are then forgotten."""
        assert count <= self.available
        taken = [self._free.pop() if self._free else self._forgotten() for _ in range(count)]
        for page in taken:
            self.holders[page] = 1
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """A row holds these pages no more. A text's end is forgotten before its beginning."""
        for page in reversed(pages):
            assert self.holders[page] > 0
            self.holders[page] -= 1
            if self.holders[page]:
                continue
            if page in self._content:
                self._kept[page] = None
            else:
                self._free.append(page)

    def _forgotten(self) -> int:
        page, _ = self._kept.popitem(last=False)
        del self._known[self._content.pop(page)]
        return page

    def _parts(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        size = self.size
        return [tuple(tokens[at : at + size]) for at in range(0, len(tokens) - size + 1, size)]

"""Tokens to text, piece by piece: never half a character, never a character of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "�"
"""What a decoder gives for the first bytes of a character whose last ones are in a later token."""


CHARACTER_BYTES = 4
"""The most that a character has, hence the most tokens."""

CONTEXT_IDS = 16
"""Ids of a prompt that a continuation's text may depend on: some characters."""


class TextStream:
    """The text of one row as it grows: `push` a token, get what may be shown.

    `decode` must give the text of a run of ids. Only the ids since the last border are decoded again, with the run
    before them for context (a word's leading space depends on what stands before it). `before` are the ids that the row
    continues: with them the text is what follows the prompt, without them it is that of the row by itself. A character
    that the prompt began and the row ends belongs to the row: before=[0x41, 0xC3], 0xA9 -> "é".
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), before: Sequence[int] = ()):
        if not all(stop):
            raise ValueError("a stop string is empty: every text contains it")
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = list(before[-CONTEXT_IDS:])
        # ids before the border are shown, those from the context on are decoded along with the new ones
        self._context, self._border = whole_from(decode, self._ids), len(self._ids)
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character or a possible stop string is open."""
        if self.stopped:
            return ""
        self._ids.append(token)
        whole = self._decode(self._ids[self._context :])
        if whole.endswith(UNFINISHED):
            return ""
        piece = self._unshown(whole)
        if self._decode(self._ids[self._border :]):  # else a special token: it is no context to a word's leading space
            self._context = self._border
        self._border = len(self._ids)
        return self._release(piece)

    def finish(self) -> str:
        """What is left at the end of the generation."""
        if self.stopped:
            return ""
        rest = self._release(self._unshown(self._decode(self._ids[self._context :])))
        if self.stopped:
            return rest
        rest, self._held = rest + self._held, ""
        return rest

    def _unshown(self, whole: str) -> str:
        """The end of `whole`, the text of all ids from the context on, that is not shown yet."""
        known = self._decode(self._ids[self._context : self._border])
        # of a prompt that ends inside a character: the border moves to that character's first id, once it is whole
        while known.endswith(UNFINISHED) and not whole.startswith(known):
            self._border -= 1
            known = self._decode(self._ids[self._context : self._border])
        return whole[len(known) :]

    def _release(self, piece: str) -> str:
        text = self._held + piece
        cuts = [at for at in (text.find(word) for word in self._stop) if at >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return text[: min(cuts)]
        open_from = len(text) - max((overlap(text, word) for word in self._stop), default=0)
        self._held = text[open_from:]
        return text[:open_from]


def overlap(text: str, word: str) -> int:
    """How many characters at the end of `text` begin `word`: ("see END", "END.") -> 3."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


def whole_from(decode: Callable[[list[int]], str], ids: list[int]) -> int:
    """Where the first whole character of `ids` begins, 0 if none does: bytes [0xA9, 0x41, 0xC3] -> 1.

    Some decoders make a whole run of bytes unreadable where it begins, or ends, inside a character.
    """
    spans = ((start, len(ids) - cut) for start in range(CHARACTER_BYTES) for cut in range(CHARACTER_BYTES))
    readable = (start for start, end in spans if start < end and not decode(ids[start:end]).startswith(UNFINISHED))
    return next(readable, 0)

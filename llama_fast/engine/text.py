"""Tokens to text, piece by piece: never half a character, never a character of a stop string, never a special token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llama_ref.arguments import texts

UNFINISHED = "�"
"""What a decoder gives for the first bytes of a character whose last ones are in a later token."""


CHARACTER_BYTES = 4
"""The most that a character has, hence the most tokens."""

CONTEXT_IDS = 16
"""Ids of a prompt that a continuation's text may depend on: some characters."""

Decode = Callable[[list[int]], str]


class TextStream:
    """The text of one row as it grows: `push` a token, get what may be shown.

    `decode` must give the text of a run of ids as it is shown. Stop strings are looked for in the text that `spelled`
    gives, in which special tokens stand: "<|im_end|>" and "<|im_end|>\\nuser" end a row, and nothing of them is shown.
    Without `spelled` both texts are the same. `before` are the ids that the row continues: with them the text is what
    follows the prompt, without them it is that of the row by itself. A character that the prompt began and the row ends
    belongs to the row: before=[0x41, 0xC3], 0xA9 -> "é".
    """

    def __init__(
        self, decode: Decode, stop: Sequence[str] = (), before: Sequence[int] = (), spelled: Decode | None = None
    ):
        self._stop = stop_strings(stop)
        self._shown = Pieces(decode, before)
        self._spelled = Pieces(spelled, before) if stop and spelled is not None else None
        self._held: list[tuple[str, str]] = []  # what may be the beginning of a stop string: as spelled, and as shown
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character or a possible stop string is open."""
        if self.stopped:
            return ""
        shown = self._shown.push(token)
        return self._release((shown if self._spelled is None else self._spelled.push(token), shown))

    def finish(self) -> str:
        """What is left at the end of the generation."""
        if self.stopped:
            return ""
        shown = self._shown.finish()
        rest = self._release((shown if self._spelled is None else self._spelled.finish(), shown))
        if self.stopped:
            return rest
        rest += "".join(shown for _, shown in self._held)
        self._held = []
        return rest

    def _release(self, piece: tuple[str, str]) -> str:
        self._held.append(piece)
        text = "".join(spelled for spelled, _ in self._held)
        cut = first_of(text, self._stop)
        if cut is not None:
            self.stopped = True
            spelled, shown = self._held[-1]
            self._held[-1] = spelled, shown + self._shown.finish()  # half a character before a special token
            shown, self._held = split(self._held, cut)[0], []
            return shown
        open_characters = max((overlap(text, word) for word in self._stop), default=0)
        if open_characters:
            shown, self._held = split(self._held, len(text) - open_characters)
        else:
            shown, self._held = "".join(shown for _, shown in self._held), []
        return shown


def stop_strings(stop: object) -> tuple[str, ...]:
    """One stop string, several or none: "END" -> ("END",); TypeError or ValueError for what can be none."""
    found = texts("stop", stop)
    if not all(found):
        raise ValueError("a stop string is empty: every text contains it")
    return found


class Pieces:
    """The text of a growing run of ids, whole characters at a time.

    Only the ids since the last border are decoded again, with the run before them for context (a word's leading space
    depends on what stands before it).
    """

    def __init__(self, decode: Decode, before: Sequence[int]):
        self._decode = decode
        self._ids: list[int] = list(before[-CONTEXT_IDS:])
        # ids before the border are told, those from the context on are decoded along with the new ones
        self._context, self._border = whole_from(decode, self._ids), len(self._ids)
        self._known = decode(self._ids[self._context :])
        """The text of the ids from the context to the border."""

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is open."""
        self._ids.append(token)
        whole = self._decode(self._ids[self._context :])
        if whole.endswith(UNFINISHED):
            return ""
        piece, new = self._untold(whole), self._decode(self._ids[self._border :])
        # a special token, which has no text, is no context to a word's leading space
        self._context, self._known = (self._border, new) if new else (self._context, whole)
        self._border = len(self._ids)
        return piece

    def finish(self) -> str:
        """The text of a character that stays open."""
        whole = self._decode(self._ids[self._context :])
        piece = self._untold(whole)
        self._known, self._border = whole, len(self._ids)
        return piece

    def _untold(self, whole: str) -> str:
        """The end of `whole`, the text of all ids from the context on, that is not told yet."""
        known = self._known
        # of a prompt that ends inside a character: the border moves to that character's first id, once it is whole
        while known.endswith(UNFINISHED) and not whole.startswith(known):
            self._border -= 1
            known = self._decode(self._ids[self._context : self._border])
        return whole[len(known) :]


def split(pieces: Sequence[tuple[str, str]], at: int) -> tuple[str, list[tuple[str, str]]]:
    """What is shown of (spelled, shown) pieces before the `at`-th spelled character, and the pieces from there on.

    split([("see ", "see "), ("</s>", ""), ("END", "END")], 9) -> ("see E", [("ND", "ND")])
    """
    before = ""
    for number, (spelled, shown) in enumerate(pieces):
        late = max(0, len(shown) - len(spelled))  # half a character that was spelled before a special token
        if at == 0 and not late:
            return before, list(pieces[number:])
        if at < len(spelled):
            # what is not shown stands before, or behind, the text that is
            kept = at if spelled.startswith(shown) else max(0, at - max(0, len(spelled) - len(shown))) + late
            return before + shown[:kept], [(spelled[at:], shown[kept:]), *pieces[number + 1 :]]
        before, at = before + shown, at - len(spelled)
    return before, []


def first_of(text: str, words: Sequence[str]) -> int | None:
    """Where the word that is complete first begins, of several the longest; None if there is none.

    ("see END", ["END", "N"]) -> 5: so it is if the text comes letter by letter, and so it must be if it comes at once.
    """
    found = [(at + len(word), at) for word in words if (at := text.find(word)) >= 0]
    return min(found)[1] if found else None


def overlap(text: str, word: str) -> int:
    """How many characters at the end of `text` begin `word`: ("see END", "END.") -> 3."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


def whole_from(decode: Decode, ids: list[int]) -> int:
    """Where the first whole character of `ids` begins, 0 if none does: bytes [0xA9, 0x41, 0xC3] -> 1.

    Some decoders make a whole run of bytes unreadable where it begins, or ends, inside a character.
    """
    spans = ((start, len(ids) - cut) for start in range(CHARACTER_BYTES) for cut in range(CHARACTER_BYTES))
    readable = (start for start, end in spans if start < end and not decode(ids[start:end]).startswith(UNFINISHED))
    return next(readable, 0)

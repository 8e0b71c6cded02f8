"""Text to ids and back, by laws that every tokenizer obeys, by what the config says, and by a witness if there is one.

Shapes: none; ids and strings.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Sequence
from typing import Protocol

from oracle.statistics.compare import Check, Verdict, empty

Encode = Callable[[str], list[int]]

TEXTS = (
    "Hello, my name is",
    "a",
    "The quick brown fox jumps over the lazy dog. It's 10:45, isn't it?",
    "def f(x):\n    return x ** 2  # two  spaces\n\n\tand a tab",
    "Grüße aus Köln, naïve café, señor; 你好,世界; Привет; नमस्ते; العربية",
    "emoji \U0001f600\U0001f469\u200d\U0001f680 and rare \U00010348 \u2603",
    "1234567890 3.14159 -7e-12 0x1F",
    "MixedCASE snake_case kebab-case ALLCAPS",
    "x" * 200,
    "line\nline\n\nline\r\nend",
    "zero\u200bwidth",
)


class Tokens(Protocol):
    """What is judged."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str, bos: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def judge_tokens(
    tokens: Tokens, vocab_size: int, bos_id: int | None, eos_ids: Sequence[int], witness: Encode | None = None
) -> Verdict:
    """Round trips, ranges, special ids (those of the model's config), and the witness's ids of the same texts.

    Text that names a special token is text: only BOS may be added, in front, once.
    """
    lost, outside, special, unlike = [], [], [], []
    ends = {*eos_ids, *tokens.eos_ids}
    for text in TEXTS:
        ids, bare = tokens.encode(text), tokens.encode(text, bos=False)
        shown = repr(text[:24])
        back = tokens.decode(ids)
        forms = {text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC"))}
        if back.removeprefix(" ") not in forms and back not in forms:
            lost.append(f"{shown} comes back as {back[:24]!r}")
        if any(not 0 <= token < vocab_size for token in ids):
            outside.append(shown)
        lead = ids[: len(ids) - len(bare)]
        if ids[len(lead) :] != bare or lead not in ([], [tokens.bos_id]) or ends & set(ids):
            special.append(f"{shown}: {ids[:4]}... with and {bare[:4]}... without BOS")
        if witness is not None and ids != (wanted := witness(text)):
            at = next((i for i, (a, b) in enumerate(zip(ids, wanted)) if a != b), min(len(ids), len(wanted)))
            unlike.append(f"{shown}: id {at} is {ids[at : at + 1]} where the witness has {wanted[at : at + 1]}")
    stated = [] if bos_id is None or tokens.bos_id in (None, bos_id) else [f"BOS is {tokens.bos_id}, not {bos_id}"]
    stated += [
        f"EOS is {token}, not one of {list(eos_ids)}" for token in tokens.eos_ids if eos_ids and token not in eos_ids
    ]
    found = [
        ("texts that do not come back", lost, len(TEXTS)),
        ("texts with ids outside the vocabulary", outside, len(TEXTS)),
        ("texts with special ids that were not asked for", special, len(TEXTS)),
        ("special ids that the config denies", stated, 1 + len(tokens.eos_ids)),
    ]
    if witness is not None:
        found.append(("texts whose ids the witness denies", unlike, len(TEXTS)))
    return Verdict(tuple(Check(name, len(wrong), 0, wrong[0] if wrong else "", of) for name, wrong, of in found))


class Writer(Protocol):
    """Ids to text, piece by piece."""

    stopped: bool

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


def judge_writer(
    writer: Callable[[tuple[str, ...]], Writer], tokens: Tokens, vocab_size: int, rows: int = 24
) -> Verdict:
    """Pieces joined are the whole text; with stop strings, the text before the first of them, and no more tokens after.

    Tried on the texts' own ids and on random ones, among which are halves of characters.
    """
    draw = random.Random(0)
    lines = [tokens.encode(text, bos=False) for text in TEXTS]
    lines += [[draw.randrange(vocab_size) for _ in range(20)] for _ in range(rows)]
    lines = [[token for token in line if token not in tokens.eos_ids] for line in lines]
    broken, leaked, compared, stopped_texts = [], [], 0, 0
    for line in lines:
        whole = tokens.decode(line)
        if not whole.strip():
            continue
        compared += 1
        text, _ = _written(writer(()), line)
        if text != whole:
            broken.append(f"{text[:24]!r} for {whole[:24]!r}")
        for stop in _stops(whole, draw):
            text, stopped = _written(writer(stop), line)
            stopped_texts += 1
            cut = min(whole.find(word) for word in stop if word in whole)
            if text != whole[:cut] or not stopped:
                leaked.append(f"stop {stop}: {text[-24:]!r} instead of {whole[:cut][-24:]!r}")
    if not compared:
        return empty("text", "no ids that are text")
    return Verdict(
        (
            Check("texts that arrive in other pieces", len(broken), 0, broken[0] if broken else "", compared),
            Check(
                "texts that end elsewhere than at a stop string",
                len(leaked),
                0,
                leaked[0] if leaked else ("" if stopped_texts else "no text is long enough to stop in"),
                stopped_texts,
            ),
        )
    )


def _written(writer: Writer, line: Sequence[int]) -> tuple[str, bool]:
    pieces = []
    for token in line:
        pieces.append(writer.push(token))
        if writer.stopped:
            break
    return "".join([*pieces, writer.finish()]), writer.stopped


def _stops(whole: str, draw: random.Random) -> list[tuple[str, ...]]:
    """Stop strings that do occur: a stretch of the text, its last characters, two at once with the later one first."""
    if len(whole) < 8 or "\ufffd" in whole:
        return []
    at = draw.randrange(len(whole) - 4)
    late, early = whole[-3:], whole[at : at + 4]
    return [(early,), (late,), (late, early)]

"""Streamed pieces: together the whole text, never half a character, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_fast.engine.text import UNFINISHED, TextStream


def decode(ids: list[int]) -> str:
    """A byte-level tokenizer: every token is one byte."""
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(max_size=40))
def test_pieces_join_to_the_text_and_hold_whole_characters(text: str) -> None:
    writer = TextStream(decode)
    pieces = [writer.push(byte) for byte in text.encode()]
    assert "�" not in "".join(pieces) or "�" in text
    assert "".join(pieces) + writer.finish() == text


@given(st.text(alphabet="abé ", max_size=30), st.lists(st.text(alphabet="abé ", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    writer = TextStream(decode, stop)
    shown = "".join(writer.push(byte) for byte in text.encode())
    shown += writer.finish()
    ends = [text.find(word) + len(word) for word in stop if word in text]
    if not ends:
        assert shown == text and not writer.stopped
        return
    complete = min(ends)  # the stop string that is complete first ends the text, where it begins
    begins = [text.find(word) for word in stop if word in text[:complete]]
    assert shown == text[: min(begins)] and writer.stopped


@given(
    st.text(alphabet="ab ", max_size=12),
    st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_where_a_text_ends_does_not_depend_on_how_it_is_cut_into_tokens(text: str, stop: list[str], data: Any) -> None:
    """("see END", ["END", "N"]): letter by letter N is complete first, and so it is in one token."""
    by_letters = TextStream(lambda ids: "".join(map(chr, ids)), stop)
    expected = "".join(by_letters.push(ord(letter)) for letter in text) + by_letters.finish()
    borders = sorted(data.draw(st.sets(st.integers(0, len(text))))) if text else []
    words = [text[begin:end] for begin, end in zip([0, *borders], [*borders, len(text)], strict=True)]
    writer = TextStream(lambda ids: "".join(words[i] for i in ids), stop)
    assert "".join(map(writer.push, range(len(words)))) + writer.finish() == expected


def test_half_a_character_before_a_special_token_is_not_lost_at_a_stop_string() -> None:
    """Bytes, and 300 for <end>: what the half was to become is told only when the next text comes, which ends the row."""

    def spelled(ids: list[int]) -> str:
        runs = "".join(chr(i) for i in ids).split(chr(300))
        return "<end>".join(bytes(map(ord, run)).decode(errors="replace") for run in runs)

    def shown(ids: list[int]) -> str:
        return bytes(i for i in ids if i != 300).decode(errors="replace")

    for stop in (["J"], ["nowhere", "JK"]):
        writer = TextStream(shown, stop, [0x41], spelled)
        pieces = [writer.push(i) for i in (0x42, 0xC3, 300, 0x4A, 0x4B)]
        assert "".join([*pieces, writer.finish()]) == "B�" and writer.stopped


def decode_by_runs(ids: list[int]) -> str:
    """As the `tokenizers` library's byte fallback: one bad byte, and each of its run (here: the text) is unreadable."""
    try:
        return bytes(ids).decode()
    except UnicodeDecodeError:
        return UNFINISHED * len(ids)


@given(st.text(st.characters(exclude_characters=UNFINISHED), max_size=30), st.integers(0, 120))
@example("Aé!", 2)
@example("é😀é", 4)
@example("€" * 9, 20)
@pytest.mark.parametrize("decode", [decode, decode_by_runs])
def test_a_character_that_the_prompt_began_belongs_to_the_continuation(
    decode: Callable[[list[int]], str], text: str, cut: int
) -> None:
    ids = list(text.encode())
    shown = bytes(ids[:cut]).decode(errors="ignore")  # the prompt's whole characters
    writer = TextStream(decode, before=ids[:cut])
    for at in range(cut, len(ids)):
        shown += writer.push(ids[at])
        assert shown == bytes(ids[: at + 1]).decode(errors="ignore")
    assert shown + writer.finish() == (text if cut < len(ids) else shown)


def test_what_the_prompt_left_unreadable_is_not_shown_again() -> None:
    for prompt in (b"A\xc3", "A\ufffd".encode(), b"A\xff\xff", "\ufffd".encode()):
        writer = TextStream(decode, before=list(prompt))
        assert [writer.push(byte) for byte in b"!?"] == ["!", "?"] and writer.finish() == ""
    writer = TextStream(decode, before=[*"A\ufffd".encode(), 0xC3])
    assert [writer.push(byte) for byte in b"\xa9!"] == ["é", "!"]


def test_what_may_be_a_stop_string_is_held_back() -> None:
    writer = TextStream(decode, ["END"])
    assert [writer.push(byte) for byte in b"aENbEND!"] == ["a", "", "", "ENb", "", "", "", ""]
    assert writer.stopped and writer.finish() == ""


SPECIAL = {1000: "<|end|>", 1001: "</s>", 1002: "<|"}  # any other id is a byte


def shown_as(ids: list[int]) -> str:
    return bytes(token for token in ids if token not in SPECIAL).decode(errors="replace")


def spelled_as(ids: list[int]) -> str:
    """Bytes between special tokens are decoded on their own, as the `tokenizers` library does."""
    runs: list[bytearray | str] = [bytearray()]
    for token in ids:
        if token in SPECIAL:
            runs += [SPECIAL[token], bytearray()]
        else:
            runs[-1].append(token)  # type: ignore[union-attr]
    return "".join(run if isinstance(run, str) else run.decode(errors="replace") for run in runs)


TOKENS = st.lists(st.sampled_from([*b"ab <|end>", *SPECIAL, *SPECIAL]), max_size=24)


@given(TOKENS, st.integers(0, 24), st.integers(1, 9), st.lists(st.text("ab <|>", min_size=1, max_size=3), max_size=2))
@example([*b"ab", 1000, *b"a"], 1, 9, [])
@example([1000, 1001, *b"ab"], 7, 7, [])
@example([*b"a<", 1000], 2, 3, [])
def test_a_stop_string_is_found_in_text_in_which_special_tokens_stand(
    ids: list[int], begin: int, length: int, more: list[str]
) -> None:
    """Of what stands before it, ordinary text is shown; of special tokens nothing is, not even where it ends in one."""
    text = spelled_as(ids)
    stop = [word for word in (text[begin : begin + length], *more) if word]
    owners = [token for token in ids for _ in SPECIAL.get(token, "x")]  # a token for each character
    writer, fed = TextStream(shown_as, stop, spelled=spelled_as), 0
    shown = ""
    for token in ids:
        shown += writer.push(token)
        fed += 1
        if writer.stopped:
            break
    shown += writer.finish()
    seen = spelled_as(ids[:fed])
    cut = min((seen.find(word) for word in stop if word in seen), default=len(text))
    assert writer.stopped == any(word in text for word in stop)
    assert shown == "".join(text[i] for i in range(cut) if owners[i] not in SPECIAL)
    assert not writer.stopped or not any(word in spelled_as(ids[: fed - 1]) for word in stop)


def test_half_a_character_before_a_special_token_is_shown_where_the_text_ends() -> None:
    for stop in (["<|end|>"], ["|end"], ["nowhere"]):
        writer = TextStream(shown_as, stop, spelled=spelled_as)
        pieces = [writer.push(token) for token in (*b"a\xc3", 1000)]
        assert "".join([*pieces, writer.finish()]) == "a\ufffd"
    writer = TextStream(shown_as, ["nowhere"], spelled=spelled_as)
    pieces = [writer.push(token) for token in (*b"a\xc3", 1000, 0xA9, *b"b")]
    assert "".join([*pieces, writer.finish()]) == shown_as([*b"a\xc3\xa9b"])  # as the ids' text is, without the token


def test_a_space_after_a_special_token_stands_in_the_stop_string_alone() -> None:
    """A decoder that drops the space before a text's first word: "<|end|> b" as spelled, "b" as shown."""

    def spaced(ids: list[int], special: bool) -> str:
        text = "".join(SPECIAL[token] * special if token in SPECIAL else f" {chr(token)}" for token in ids)
        return text.removeprefix(" ")

    for stop, expected in (("<|end|> b", ""), ("> b c", ""), (" c", "b"), ("c", "b "), ("<|end|>b", "b c")):
        writer = TextStream(lambda ids: spaced(ids, False), [stop], spelled=lambda ids: spaced(ids, True))
        pieces = [writer.push(token) for token in (1000, *b"bc")]
        assert "".join([*pieces, writer.finish()]) == expected, stop


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(decode, ["x", ""])

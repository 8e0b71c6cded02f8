"""Streamed pieces: together the whole text, never half a character, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable

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


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(decode, ["x", ""])

"""Streamed pieces: together the whole text, never half a character, nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_fast.text import TextStream


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


def test_what_may_be_a_stop_string_is_held_back() -> None:
    writer = TextStream(decode, ["END"])
    assert [writer.push(byte) for byte in b"aENbEND!"] == ["a", "", "", "ENb", "", "", "", ""]
    assert writer.stopped and writer.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(decode, ["x", ""])

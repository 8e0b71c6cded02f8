"""What is asked: ragged batches of tokens, and where prefill ends and decoding begins."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_ref.arguments import row_of_ids, rows_of_ids, several, shown, whole

TEXT = Path(__file__).parents[1] / "data" / "alice.txt"
"""Public-domain prose; its source stands in data/README.md."""


@dataclass(frozen=True)
class Split:
    """One teacher-forced decoding of a batch: row b is cut to `ends[b]` tokens, of which `starts[b]` are prefilled."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("starts", "ends"):
            object.__setattr__(self, name, tuple(row_of_ids(name, getattr(self, name))))
        if len(self.starts) != len(self.ends):
            raise ValueError(f"starts has {len(self.starts)} entries, ends {len(self.ends)}: one of each for every row")
        for start, end in zip(self.starts, self.ends):
            if not 1 <= start <= end:
                raise ValueError(f"starts holds {start} where ends holds {end}: 1 <= start <= end")


@dataclass(frozen=True)
class Case:
    """A ragged batch, the splits at which it is decoded, and the prompts that are continued greedily."""

    rows: tuple[tuple[int, ...], ...]
    splits: tuple[Split, ...]
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int

    def __post_init__(self) -> None:
        for name in ("rows", "prompts"):
            object.__setattr__(self, name, tuple(map(tuple, rows_of_ids(name, getattr(self, name)))))
        object.__setattr__(self, "splits", tuple(several("splits", self.splits, "several Splits")))
        object.__setattr__(self, "new_tokens", whole("new_tokens", self.new_tokens, 0))
        for split in self.splits:
            if not isinstance(split, Split):
                raise TypeError(f"splits holds {shown(split)}: each must be a Split")
            if len(split.starts) != len(self.rows):
                raise ValueError(f"splits holds one for {len(split.starts)} rows, and rows has {len(self.rows)}")
            for end, row in zip(split.ends, self.rows):
                if end > len(row):
                    raise ValueError(f"splits: a row ends at {end}, and has {len(row)} tokens")

    @property
    def longest(self) -> int:
        """Positions that a cache must hold for all of it."""
        return max(max(map(len, self.rows), default=0), max(map(len, self.prompts), default=0) + self.new_tokens)


def random_row(vocab_size: int, length: int, seed: int) -> tuple[int, ...]:
    """Uniform tokens, the same in every process."""
    draw = random.Random(whole("seed", seed))
    return tuple(draw.randrange(vocab_size) for _ in range(length))


def text_rows(
    encode: Callable[[str], list[int]], lengths: Sequence[int], text: str | None = None
) -> list[tuple[int, ...]]:
    """Consecutive stretches of the shipped text, or of another, each encoded as a text of its own (with BOS, if texts
    have one). Another text may be too short: rows are then shorter, and those without a second token left out."""
    text = TEXT.read_text(encoding="utf-8") if text is None else text
    rows, at = [], 0
    for length in lengths:
        row = encode(text[at : at + 6 * length])[:length]
        rows.append(tuple(row))
        at += 6 * length
    return [row for row in rows if len(row) > 1]


def standard_case(
    vocab_size: int, max_context: int, encode: Callable[[str], list[int]] | None = None, seed: int = 1
) -> Case:
    """Two rows of 129 and 96 tokens (fewer in a short context): real text and its neighbour, or random tokens.

    Decoding starts at three quarters; after one token; and near the end, where prefill is long and decode short.
    """
    vocab_size, max_context = whole("vocab_size", vocab_size, 1), whole("max_context", max_context, 4)
    long = min(129, max_context)
    short = max(2, long * 3 // 4)
    if encode is not None:
        rows = tuple(text_rows(encode, (long, short)))
        long, short = map(len, rows)
    else:
        rows = (random_row(vocab_size, long, seed), random_row(vocab_size, short, seed + 1))
    most, many = max(1, long * 3 // 4), max(1, short * 2 // 3)
    splits = (
        Split((most, many), (long, short)),
        Split((1, short - 2), (min(long, 24), short)),
        Split((long - 3, 2), (long, min(short, 8))),
    )
    new = max(1, min(24, max_context - 12))
    return Case(rows, splits, (rows[0][: min(12, max_context - new)], rows[1][: min(5, max_context - new)]), new)

"""Laws of the int4 encodings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_fast.encodings.int4 import Int4, packed, unpacked


@given(st.integers(0, 2**31))
def test_what_is_packed_is_what_is_unpacked(seed: int) -> None:
    nibbles = torch.randint(0, 16, (3, 256), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = packed(nibbles)
    assert words.dtype is torch.int32 and words.shape == (3, 32)
    assert torch.equal(unpacked(words), nibbles)
    word = int(words[2, 5])
    assert [word >> (8 * b) & 15 for b in range(4)] == nibbles[2, 40:44].tolist()
    assert [word >> (8 * b + 4) & 15 for b in range(4)] == nibbles[2, 44:48].tolist()


def test_columns_that_are_no_groups_are_refused_with_a_smaller_group() -> None:
    with pytest.raises(ValueError, match="int4 has groups of 128 columns, which 576 columns are not: take int4-g64"):
        Int4().encode(torch.ones(2, 576), torch.float32)
    with pytest.raises(ValueError, match=r"which 40 columns are not$"):
        Int4(32).layout((2, 40))
    with pytest.raises(ValueError, match="group=48: a group is a multiple of 32 columns"):
        Int4(48)

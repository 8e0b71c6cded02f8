"""Laws of the 2:4 sparse encodings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_fast.encodings.sparse24 import Sparse24, spread, two_of_four


@given(st.integers(0, 2**31), st.booleans())
def test_the_two_largest_of_each_four_stay_where_they_were(seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 64, generator=generator)
    weight = weight.round() if ties else weight
    values, places = two_of_four(weight)
    assert values.shape == (3, 32) and places.shape == (3, 2) and places.dtype is torch.int32
    again = spread(values, places)
    kept = again != 0
    assert torch.equal(again[kept], weight[kept])
    four, left = weight.abs().unflatten(1, (-1, 4)), again.abs().unflatten(1, (-1, 4))
    assert torch.equal(left.sort(-1).values[..., 2:], four.sort(-1).values[..., 2:])
    assert torch.equal(spread(*two_of_four(again)), again), "what is pruned already is stored as it is"


def test_columns_that_are_no_words_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="sparse24 stores 32 columns together, which 40 columns are not"):
        Sparse24().encode(torch.ones(2, 40), torch.float32)

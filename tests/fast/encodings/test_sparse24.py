"""Laws of the 2:4 sparse encodings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_fast.encodings.sparse24 import Sparse24, spread, two_of_four
from llama_fast.model.matrices import Matrix, Stored, Table

KINDS = [Sparse24(), Sparse24(True)]


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


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_and_the_rows_are_the_decoded_matrixs(kind: Sparse24, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = kind.encode(torch.randn(40, 96, generator=generator), dtype)
    for name, (shape, _) in kind.layout((40, 96)).items():
        assert tuple(parts[name].shape) == shape
    x = torch.randn(2, 3, 96, generator=generator).to(dtype)
    stored = Stored(kind, (40, 96), parts)
    y = Matrix(stored)(x)
    assert y.shape == (2, 3, 40) and y.dtype is dtype
    exact = x.double() @ kind.decode(parts).double().T
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), exact, atol=tolerance * float(exact.abs().max()), rtol=tolerance)
    ids = torch.tensor([[3, 1], [39, 3]])
    assert torch.equal(Table(stored, dtype)(ids), kind.decode(parts)[ids].to(dtype))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_shards_of_columns_decode_to_columns(kind: Sparse24) -> None:
    parts = kind.encode(torch.randn(6, 128, generator=torch.Generator().manual_seed(1)), torch.float32)
    halves = [kind.cut(parts, (6, 128), (slice(2, 6), slice(first, first + 64))) for first in (0, 64)]
    assert torch.equal(torch.cat([kind.decode(half) for half in halves], 1), kind.decode(parts)[2:])
    with pytest.raises(ValueError, match="columns 0 to 48 of 128 part one of"):
        kind.cut(parts, (6, 128), (slice(0, 6), slice(0, 48)))


def test_columns_that_are_no_words_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="sparse24 stores 32 columns together, which 40 columns are not"):
        Sparse24().encode(torch.ones(2, 40), torch.float32)

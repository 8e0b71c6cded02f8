"""Laws of the int8 encoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_fast.encodings.int8 import Int8
from llama_fast.encodings.scales import ceil_bf16
from llama_fast.model.matrices import Matrix, Stored, Table

MATRICES = st.builds(
    lambda seed, rows, columns, power: (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    ),
    st.integers(0, 2**31),
    st.integers(2, 9),
    st.integers(1, 33),
    st.integers(-6, 4),
)


@given(MATRICES)
def test_the_error_is_at_most_half_a_step_and_the_range_symmetric(weight: torch.Tensor) -> None:
    parts = Int8().encode(weight, torch.float32)
    assert parts["weight"].dtype is torch.int8 and parts["scale"].shape == (weight.shape[0], 1)
    assert parts["weight"].abs().max() <= 127
    step = parts["scale"].double()
    error = (Int8().decode(parts).double() - weight.double()).abs()
    assert (error <= step / 2 * (1 + 1e-6)).all()


@given(MATRICES)
def test_decoding_is_exact_and_encoding_it_again_changes_nothing(weight: torch.Tensor) -> None:
    parts = Int8().encode(weight, torch.float32)
    exact = parts["weight"].double() * parts["scale"].double()
    assert torch.equal(Int8().decode(parts).double(), exact)
    rows = (
        parts["weight"].abs().amax(1) == 127
    )  # where the largest weight uses the whole range the scale is a fixed point
    again = Int8().encode(Int8().decode(parts), torch.float32)
    assert torch.equal(again["weight"][rows], parts["weight"][rows])


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    assert torch.equal(Int8().decode(Int8().encode(weight, torch.float32))[0], torch.zeros(2))


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_ceil_bf16_is_the_least_bf16_number_not_below(value: float) -> None:
    x = torch.tensor([value], dtype=torch.float32)
    up = ceil_bf16(x)
    assert up.float() >= x
    below = (up.view(torch.int16) - 1).view(torch.bfloat16)
    assert below.float() < x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("columns", [64, 192, 60, 7])
def test_the_product_is_the_decoded_matrixs(dtype: torch.dtype, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, columns, generator=generator)
    parts = Int8().encode(weight, dtype)
    x = torch.randn(2, rows, columns, generator=generator).to(dtype)
    y = Matrix(Stored(Int8(), tuple(parts["weight"].shape), parts))(x)
    assert y.shape == (2, rows, 40) and y.dtype is dtype
    exact = x.double() @ Int8().decode(parts).double().T
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), exact, atol=tolerance * float(exact.abs().max()), rtol=tolerance)


def test_the_embedding_shares_the_heads_storage() -> None:
    parts = Int8().encode(torch.randn(10, 6), torch.float32)
    linear, embedding = (
        Matrix(Stored(Int8(), tuple(parts["weight"].shape), parts)),
        Table(Stored(Int8(), tuple(parts["weight"].shape), parts), torch.float32),
    )
    assert linear.weight.data_ptr() == embedding.weight.data_ptr()
    assert torch.equal(embedding(torch.tensor([[3, 1]])), Int8().decode(parts)[[3, 1]][None])

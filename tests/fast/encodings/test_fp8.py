"""Laws of the fp8 encodings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_fast.encodings.fp8 import Fp8
from llama_fast.model.matrices import Matrix, Stored, Table

MATRICES = st.builds(
    lambda seed, rows, columns, power: (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    ),
    st.integers(0, 2**31),
    st.integers(2, 9),
    st.sampled_from([11, 33]),
    st.integers(-6, 4),
)


@pytest.mark.parametrize("kind", [Fp8(), Fp8(11)], ids=lambda kind: kind.name)
@given(weight=MATRICES)
def test_a_weight_is_at_most_a_sixteenth_of_itself_off(kind: Fp8, weight: torch.Tensor) -> None:
    parts = kind.encode(weight, torch.float32)
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        name: shape for name, (shape, _) in kind.layout(weight.shape).items()
    }
    scale = parts["scale"].double().repeat_interleave(weight.shape[1] // parts["scale"].shape[1], 1)
    error = (kind.decode(parts).double() - weight.double()).abs()
    assert (error <= (weight.double().abs() / 16).maximum(scale * 2**-10) * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", [Fp8(), Fp8(16)], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_and_the_rows_are_the_decoded_matrixs(kind: Fp8, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = kind.encode(torch.randn(40, 80, generator=generator), dtype)
    x = torch.randn(2, 3, 80, generator=generator).to(dtype)
    stored = Stored(kind, (40, 80), parts)
    y = Matrix(stored)(x)
    assert y.shape == (2, 3, 40) and y.dtype is dtype
    exact = x.double() @ kind.decode(parts).double().T
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), exact, atol=tolerance * float(exact.abs().max()), rtol=tolerance)
    ids = torch.tensor([[3, 1], [39, 3]])
    assert torch.equal(Table(stored, dtype)(ids), kind.decode(parts)[ids].to(dtype))


def test_groups_are_cut_between_groups() -> None:
    kind = Fp8(16)
    parts = kind.encode(torch.randn(6, 64, generator=torch.Generator().manual_seed(1)), torch.float32)
    pieces = [kind.cut(parts, (6, 64), (slice(2, 6), columns)) for columns in (slice(0, 16), slice(16, 64))]
    assert torch.equal(torch.cat([kind.decode(piece) for piece in pieces], 1), kind.decode(parts)[2:])
    with pytest.raises(ValueError, match="columns 0 to 24 of 64 part one of 4 groups"):
        kind.cut(parts, (6, 64), (slice(0, 6), slice(0, 24)))
    with pytest.raises(ValueError, match="fp8-g16 has groups of 16 columns, which 40 columns are not: take fp8"):
        kind.encode(torch.ones(2, 40), torch.float32)
    with pytest.raises(ValueError, match="group=-1"):
        Fp8(-1)

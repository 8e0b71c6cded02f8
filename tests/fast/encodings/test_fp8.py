"""Laws of the fp8 encodings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_fast.encodings.fp8 import Fp8

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


def test_a_group_that_is_torn_is_told_with_numbers() -> None:
    kind = Fp8(16)
    parts = kind.encode(torch.ones(6, 64), torch.float32)
    with pytest.raises(ValueError, match="columns 0 to 24 of 64 part one of 4 groups"):
        kind.cut(parts, (6, 64), (slice(0, 6), slice(0, 24)))
    with pytest.raises(ValueError, match="fp8-g16 has groups of 16 columns, which 40 columns are not: take fp8"):
        kind.encode(torch.ones(2, 40), torch.float32)
    with pytest.raises(ValueError, match="group=-1"):
        Fp8(-1)

"""Laws that hold for every encoding, those that are only read from files as well: one table says what each is tried with."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama_fast.encodings.by_name import readable
from llama_fast.encodings.fp8 import Fp8
from llama_fast.encodings.ggml import DECODERS, Ggml
from llama_fast.encodings.int4 import Int4
from llama_fast.encodings.int8_groups import Int8Groups
from llama_fast.encodings.ordered import Ordered
from llama_fast.encodings.whole_numbers import WholeNumbers
from llama_fast.model.matrices import Matrix, Stored, Table
from llama_ref.formats.gguf_blocks import BLOCKS
from tests.fast.encodings.test_ggml import modest

KINDS = {
    **readable(),
    **{
        kind.name: kind
        for kind in (
            *(Fp8(16), Int8Groups(), Int8Groups(16), Int8Groups(32, True), Int8Groups(0, True)),
            *(Ordered(Int4(32)), Ordered(Int4(32, True)), Ordered(Int8Groups(16, True))),
        )
    },
}


class Trial(NamedTuple):
    """What an encoding is tried with."""

    columns: int = 256
    tolerance: float = 8e-3
    """Of a bf16 product, as a share of the largest output. In float32 it is 1e-5 for all."""
    cut: int = 128
    """Columns after which a matrix can be cut."""
    torn: int | None = None
    """Columns after which it cannot."""
    ragged: int | None = None
    """Columns of which no matrix can be."""


SCALED_LAST = 2e-2  # the sum is rounded before it is scaled
TRIALS = {
    **dict.fromkeys(("dense", "stored", "f16", "bf16"), Trial(96, cut=32)),
    "int8": Trial(96, SCALED_LAST, cut=32),
    "fp8": Trial(80, SCALED_LAST, cut=16),
    "fp8-g16": Trial(80, cut=16, torn=24, ragged=40),
    "fp8-g128": Trial(torn=64, ragged=192),
    **dict.fromkeys(("sparse24", "sparse24-int8"), Trial(96, SCALED_LAST, cut=32, torn=48, ragged=40)),
    **dict.fromkeys(("int4", "int4-zero", "int8-g128"), Trial(torn=64, ragged=192)),
    **dict.fromkeys(("int4-g64", "int4-g64-zero"), Trial(cut=64, torn=32, ragged=96)),
    **dict.fromkeys(("int4-g32", "int4-g32-zero"), Trial(cut=64, torn=16, ragged=48)),
    "int8-g16": Trial(cut=16, torn=24, ragged=40),
    "int8-g32-zero": Trial(cut=64, torn=48, ragged=48),
    "int8-zero": Trial(),
    **{name: Trial(torn=128) for name in KINDS if name.endswith("-order")},
    **{name: Trial(512, cut=BLOCKS[name][0], torn=BLOCKS[name][0] // 2, ragged=16) for name in DECODERS},
}
DTYPES = [torch.float32, torch.bfloat16]


def stored(name: str, rows: int, dtype: torch.dtype, columns: int | None = None) -> tuple[Stored, Tensor]:
    """A matrix of random numbers as this encoding has it, and what it stands for; ordered columns stand in a random order."""
    kind, columns = KINDS[name], columns or TRIALS[name].columns
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    if isinstance(kind, Ggml):
        parts = modest(name, rows, columns)
        return Stored(kind, (rows, columns), parts), kind.decode(parts)
    if isinstance(kind, Ordered):
        order = torch.randperm(columns, generator=generator)
        inner = kind.inner.encode(weight, dtype)
        exact = torch.empty(rows, columns)
        exact[:, order] = kind.inner.decode(inner)
        return Stored(kind, (rows, columns), {**inner, "order": order.int()[None]}), exact
    parts = kind.encode(weight, dtype)
    return Stored(kind, (rows, columns), parts), kind.decode(parts)


def test_every_encoding_is_tried() -> None:
    assert TRIALS.keys() == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bf16"])
def test_the_layout_says_what_is_stored(name: str, dtype: torch.dtype) -> None:
    held, exact = stored(name, 40, dtype)
    layout = held.encoding.layout(held.shape)
    assert {part: tuple(tensor.shape) for part, tensor in held.parts.items()} == {
        part: shape for part, (shape, _) in layout.items()
    }
    for part, (_, kind) in layout.items():
        found = held.parts[part].dtype
        assert found is kind if kind is not None else found.is_floating_point
    assert exact.shape == held.shape and torch.equal(held.encoding.decode(held.parts), exact)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bf16"])
def test_the_product_and_the_rows_are_the_decoded_matrixs(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_fast.encodings.ggml.SLICE_NUMBERS", 7 * 512)  # six slices, the last of five rows
    held, exact = stored(name, 40, dtype)
    x = torch.randn(2, 3, held.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    y = Matrix(held)(x)
    assert y.shape == (2, 3, 40) and y.dtype is dtype
    wanted = x.double() @ exact.double().T
    tolerance = 1e-5 if dtype is torch.float32 else TRIALS[name].tolerance
    torch.testing.assert_close(y.double(), wanted, atol=tolerance * float(wanted.abs().max()), rtol=tolerance)
    ids = torch.tensor([[3, 1], [39, 3]])
    assert torch.equal(Table(held, dtype)(ids), exact[ids].to(dtype))


@pytest.mark.parametrize("name", [name for name in KINDS if not name.endswith("-order")])
def test_what_ranks_hold_decodes_to_their_rows_and_columns(name: str) -> None:
    trial, kind = TRIALS[name], KINDS[name]
    held, exact = stored(name, 6, torch.float32, 3 * trial.cut)
    unequal = slice(0, trial.cut), slice(trial.cut, None)
    parts = [kind.cut(held.parts, held.shape, (slice(2, 6), columns)) for columns in unequal]
    assert all(part.is_contiguous() for each in parts for part in each.values())
    assert torch.equal(torch.cat([kind.decode(each) for each in parts], 1), exact[2:])


@pytest.mark.parametrize("name", [name for name, trial in TRIALS.items() if trial.torn])
def test_a_cut_through_what_stands_together_is_refused_with_its_numbers(name: str) -> None:
    trial = TRIALS[name]
    held, _ = stored(name, 6, torch.float32, 4 * trial.cut)
    for rows in (slice(0, 6), slice(2, 4)):
        with pytest.raises(ValueError, match=rf"columns 0 to {trial.torn} of {4 * trial.cut} part (one|\d)"):
            held.encoding.cut(held.parts, held.shape, (rows, slice(0, trial.torn)))


@pytest.mark.parametrize("name", [name for name, trial in TRIALS.items() if trial.ragged])
def test_columns_that_are_no_whole_groups_are_refused_with_their_number(name: str) -> None:
    ragged = TRIALS[name].ragged
    assert ragged is not None
    with pytest.raises(ValueError, match=f"{name} .*which {ragged} columns are not"):
        KINDS[name].layout((2, ragged))
    with pytest.raises(ValueError):
        KINDS[name].encode(torch.ones(2, ragged), torch.float32)


MATRICES = st.builds(
    lambda seed, rows, groups, power, shift: (
        torch.randn(rows, 128 * groups, generator=torch.Generator().manual_seed(seed)) * 10.0**power + shift
    ),
    st.integers(0, 2**31),
    st.integers(2, 5),
    st.integers(1, 3),
    st.integers(-6, 4),
    st.sampled_from([0.0, 1e-3, -2.0]),
)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if isinstance(kind, WholeNumbers)])
@given(weight=MATRICES)
def test_no_weight_is_more_than_half_a_step_off(name: str, weight: Tensor) -> None:
    """Where a zero is stored it is rounded too: a whole step."""
    kind = KINDS[name]
    assert isinstance(kind, WholeNumbers)
    parts = kind.encode(weight, torch.float32)
    error = (kind.decode(parts).double() - weight.double()).abs().unflatten(1, (parts["scale"].shape[1], -1))
    step = parts["scale"].double().abs()[..., None]
    slack = 1e-6 if kind.kind == "int4" else 1e-5
    assert (error <= step * (1.0 if kind.zero_point else 0.5) * (1 + slack)).all()

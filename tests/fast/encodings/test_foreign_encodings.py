"""Laws of the encodings that other tools' files need: int8 in groups and with zero points, and columns in any order."""

from __future__ import annotations

import pytest
import torch

from llama_fast.contracts import Encoding
from llama_fast.encodings.fp8 import Fp8
from llama_fast.encodings.int4 import Int4
from llama_fast.encodings.int8 import Int8
from llama_fast.encodings.int8_groups import Int8Groups
from llama_fast.encodings.ordered import Ordered
from llama_fast.model.matrices import Stored, joined
from llama_fast.recipes import encoding_named

GROUPED = [Int8Groups(), Int8Groups(16), Int8Groups(32, True), Int8Groups(0, True)]


def name_of(kind: Encoding) -> str:
    return kind.name


def ordered(inner: Encoding, shape: tuple[int, int], seed: int = 0) -> tuple[Stored, torch.Tensor]:
    """A matrix whose columns are stored in a random order, and what it stands for."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(shape[1], generator=generator)
    parts = inner.encode(torch.randn(*shape, generator=generator), torch.float32)
    exact = torch.empty(shape)
    exact[:, order] = inner.decode(parts)
    return Stored(Ordered(inner), shape, {**parts, "order": order.int()[None]}), exact


KINDS = [*GROUPED, Ordered(Int4(32)), Ordered(Int4(32, True)), Ordered(Int8Groups(16, True))]


def test_ordered_columns_are_cut_where_whole_groups_lie_on_one_side() -> None:
    """Columns 0 to 127 and 128 to 255 have groups of their own here, each in an order within and among itself."""
    stored, _ = ordered(Int4(32), (6, 256))
    generator = torch.Generator().manual_seed(5)
    order = torch.cat([torch.randperm(128, generator=generator), 128 + torch.randperm(128, generator=generator)])
    order = order.view(8, 32)[torch.tensor([5, 0, 7, 2, 3, 6, 1, 4])].flatten()
    parts = {**stored.parts, "order": order.int()[None]}
    whole = stored.encoding.decode(parts)
    halves = [stored.encoding.cut(parts, (6, 256), (slice(1, 5), slice(at, at + 128))) for at in (0, 128)]
    assert halves[0]["order"].shape == (1, 128) and halves[0]["scale"].shape == (4, 4)
    assert torch.equal(torch.cat([stored.encoding.decode(half) for half in halves], 1), whole[1:5])


def test_a_cut_through_ordered_groups_is_refused_with_numbers() -> None:
    stored, exact = ordered(Int4(32), (6, 256))
    rows = stored.encoding.cut(stored.parts, (6, 256), (slice(2, 4), slice(None)))
    assert torch.equal(stored.encoding.decode(rows), exact[2:4])
    with pytest.raises(
        ValueError, match="columns 0 to 128 of 256 part 8 of 8 groups, whose columns stand in any order"
    ):
        stored.encoding.cut(stored.parts, (6, 256), (slice(0, 6), slice(0, 128)))


def test_a_cut_through_the_only_group_is_refused() -> None:
    """Its scale would do for both sides, but its words would be those of a group of another size."""
    kind = Int4(128)
    parts = kind.encode(torch.randn(4, 128, generator=torch.Generator().manual_seed(1)), torch.float32)
    with pytest.raises(ValueError, match="columns 64 to 128 of 128 part one of 1 groups"):
        kind.cut(parts, (4, 128), (slice(0, 4), slice(64, 128)))


def test_matrices_in_one_order_are_joined_and_keep_it_once() -> None:
    one, exact = ordered(Int4(32), (6, 256))
    other, _ = ordered(Int4(32), (10, 256))
    other = Stored(other.encoding, other.shape, {**other.parts, "order": one.parts["order"]})
    both = joined([one, other])
    assert both.shape == (16, 256) and both.parts["order"].shape == (1, 256)
    assert torch.equal(both.encoding.decode(both.parts)[:6], exact)
    differing = Stored(other.encoding, other.shape, {**other.parts, "order": one.parts["order"].flip(1)})
    with pytest.raises(ValueError, match="with columns in orders that differ cannot be joined"):
        joined([one, differing])


@pytest.mark.parametrize(
    "kind", [*KINDS, Int8(), Int4(), Int4(64), Int4(96, True), Fp8(), Fp8(16), Fp8(128)], ids=name_of
)
def test_an_encoding_is_found_by_its_name(kind: Encoding) -> None:
    assert encoding_named(kind.name) == kind


@pytest.mark.parametrize(
    "name", ["int4-g0", "int4-g", "int8-g-zero", "int8-order-zero", "fp8-g0", "fp8-order", "-order", "int4 "]
)
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(ValueError, match="unknown encoding"):
        encoding_named(name)


def test_an_impossible_size_is_refused_with_it() -> None:
    with pytest.raises(ValueError, match="group=48: a group is a multiple of 32 columns"):
        encoding_named("int4-g48")
    with pytest.raises(ValueError, match="int8-g48 has groups of 48 columns, which 64 columns are not: take int8"):
        encoding_named("int8-g48").layout((2, 64))


@pytest.mark.parametrize("inner", [Int4(), Int4(128, True), Int4(64), Int4(32, True), *GROUPED], ids=name_of)
def test_a_name_with_sizes_in_it_stands_for_the_encoding_that_bears_it(inner: Encoding) -> None:
    """Also where the size is the usual one and is not said, as in "int4-order", of which no plan has heard."""
    assert encoding_named(inner.name) == inner
    assert encoding_named(Ordered(inner).name) == Ordered(inner)

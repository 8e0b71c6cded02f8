"""Laws of the fit: feedback makes the outputs' error smaller, what is on the grid stays, and 2:4 keeps what it should."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_fast.calibration.moments import DAMPING, Moments
from llama_fast.calibration.rounding import round_alone, round_with_feedback
from llama_fast.encodings.fp8 import Fp8, Fp8Grid
from llama_fast.encodings.int4 import Int4, Int4Grid
from llama_fast.encodings.sparse24 import Sparse24

KINDS = [Int4(32), Int4(64), Int4(), Int4(32, True), Fp8(), Fp8(128), Sparse24(), Sparse24(True)]
BF16 = torch.bfloat16
UNIFORM = torch.ones(256)


def layer(seed: int = 0, inputs: int = 1200) -> tuple[Tensor, Tensor]:
    """Weights [40, 256], and inputs of which neighbours go together and few are large, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 256, generator=generator) * torch.rand(40, 1, generator=generator)
    mix = torch.randn(64, 256, generator=generator) * torch.rand(256, generator=generator).exp() ** 2
    x = torch.randn(inputs, 64, generator=generator) @ mix + 0.3 * torch.randn(inputs, 256, generator=generator)
    return weight, x


def output_error(kind: Any, parts: dict[str, Tensor], weight: Tensor, x: Tensor) -> float:
    return float((x.double() @ (kind.decode(parts).double() - weight.double()).T).square().mean())


@pytest.mark.parametrize(
    ("kind", "weighted", "feedback"),
    [
        (Int4(32), 0.9, 0.5),
        (Int4(), 0.9, 0.5),
        (Int4(32, True), 0.95, 0.5),
        (Fp8(), 1.01, 0.5),
        (Sparse24(), 1.0, 0.5),
        (Sparse24(True), 1.0, 0.5),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_fit_lowers_the_error_of_the_outputs(kind: Any, weighted: float, feedback: float) -> None:
    """On inputs that the fit has not seen; the factors are shares of the error of rounding to the nearest."""
    weight, x = layer()
    seen, unseen = x[:1000], x[1000:]
    moments = Moments.of(seen)
    plain = output_error(kind, kind.encode(weight, BF16), weight, unseen)
    grid = kind.grid(weight, moments.cost(), BF16)
    assert output_error(kind, round_alone(weight, moments.cost(), grid), weight, unseen) < weighted * plain
    answered = round_with_feedback(weight, moments.answers()[0], grid)
    assert output_error(kind, answered, weight, unseen) < feedback * plain


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_a_fit_gives_is_laid_out_as_the_encoding_says(kind: Any) -> None:
    weight, x = layer()
    moments = Moments.of(x)
    grid = kind.grid(weight, moments.cost(), BF16)
    for parts in (round_alone(weight, moments.cost(), grid), round_with_feedback(weight, moments.answers()[0], grid)):
        layout = kind.layout(weight.shape)
        assert parts.keys() == layout.keys()
        for name, (shape, dtype) in layout.items():
            assert tuple(parts[name].shape) == shape and parts[name].dtype in (dtype, BF16), name
        assert kind.decode(parts).float().isfinite().all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("feedback", [False, True], ids=["weighted", "feedback"])
def test_without_a_search_and_with_inputs_that_are_all_alike_a_fit_is_rounding_to_the_nearest(
    kind: Any, feedback: bool
) -> None:
    weight, _ = layer()
    grid = kind.grid(weight, UNIFORM, BF16)
    if isinstance(grid, Int4Grid | Fp8Grid):
        grid = dataclasses.replace(grid, shares_of_range=(1.0,))
    alike = Moments(torch.eye(256), 1000)
    parts = (
        round_with_feedback(weight, alike.answers()[0], grid) if feedback else round_alone(weight, alike.cost(), grid)
    )
    plain = kind.encode(weight, BF16)
    for name in plain:
        assert torch.equal(parts[name].float(), plain[name].float()), name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("feedback", [False, True], ids=["weighted", "feedback"])
def test_weights_that_can_be_stored_as_they_are_stay(kind: Any, feedback: bool) -> None:
    weight, x = layer()
    most, least = {"int4-g32-zero": (4.0, -3.5), "sparse24-int8": (127 / 32, -1.0)}.get(kind.name, (3.5, -3.5))
    weight[:, ::32], weight[:, 1::32] = most, least  # a range that is a whole number of steps
    weight = kind.decode(kind.encode(weight, BF16)).float()
    moments = Moments.of(x)
    grid = kind.grid(weight, moments.cost(), BF16)
    U = moments.answers()[0]
    parts = round_with_feedback(weight, U, grid) if feedback else round_alone(weight, moments.cost(), grid)
    assert torch.equal(kind.decode(parts).float(), weight)


def test_a_group_may_use_all_sixteen_numbers_by_a_negative_scale() -> None:
    weight = torch.arange(-7.0, 9.0).repeat(2, 2)
    weight[1] *= -0.5
    parts = round_alone(weight, torch.ones(32), Int4(32).grid(weight, torch.ones(32), BF16))
    assert torch.equal(Int4(32).decode(parts), weight)
    assert parts["scale"].flatten().tolist() == [-1.0, 0.5]


def test_two_of_four_are_those_that_an_enumeration_keeps() -> None:
    """Wanda's rule: of all six choices the one whose dropped |weight| * norm of its input is least, as a sum of squares."""
    weight, x = layer(3)
    moments = Moments.of(x)
    kept = Sparse24().decode(round_alone(weight, moments.H.diagonal(), Sparse24().grid(weight, UNIFORM, BF16))) != 0
    norm = x.double().square().mean(0).sqrt()
    differs = 0
    for row, first in itertools.product(range(40), range(0, 256, 4)):
        four = slice(first, first + 4)
        loss = (weight[row, four].double().abs() * norm[four]) ** 2
        best = min(itertools.combinations(range(4), 2), key=lambda dropped: float(sum(loss[i] for i in dropped)))
        assert [i for i in range(4) if not kept[row, first + i]] == list(best)
        differs += set(weight[row, four].abs().topk(2, largest=False).indices.tolist()) != set(best)
    assert differs > 100, "the norms of the inputs change the choice"


def test_an_error_is_answered_by_the_columns_that_go_with_it() -> None:
    """Two equal inputs: what the first column is rounded up by, the second is rounded down by."""
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(1)).expand(500, 32)
    weight = torch.full((2, 32), 0.3)
    weight[:, 0], weight[1, 1] = 7.0, -0.4
    kind = Int4(32)
    answered = round_with_feedback(weight, Moments.of(x).answers()[0], kind.grid(weight, torch.ones(32), BF16))
    off = (kind.decode(answered) - weight).sum(1).abs()
    nearest = (kind.decode(kind.encode(weight, BF16)) - weight).sum(1).abs()
    assert (nearest > 5).all() and (off < 1).all()


def test_a_column_that_the_text_never_reaches_is_rounded_by_itself() -> None:
    weight, x = layer()
    x = x.clone()
    x[:, 5] = 0
    moments = Moments.of(x)
    assert moments.dead.nonzero().flatten().tolist() == [5]
    U = moments.answers()[0]
    assert not U[5, 6:].any() and not U[:5, 5].any(), "it neither answers nor asks"
    for kind in (Int4(32), Fp8(), Sparse24(True)):
        grid = kind.grid(weight, moments.cost(), BF16)
        for parts in (round_with_feedback(weight, U, grid), round_alone(weight, moments.cost(), grid)):
            off = (kind.decode(parts)[:, 5] - weight[:, 5]).abs()
            assert (off <= weight[:, 5].abs().clamp(min=0.25 * weight.abs().amax(1))).all()


def test_moments_that_cannot_be_inverted_are_damped_until_they_can_be_inverted() -> None:
    x = torch.ones(300, 64) * torch.arange(300.0)[:, None]
    U, damping = Moments.of(x).answers()
    assert U.isfinite().all() and damping >= DAMPING
    assert torch.equal(U, U.triu())
    zero = Moments(torch.zeros(64, 64), 10)
    U, damping = zero.answers()
    assert U.isfinite().all() and (zero.cost() > 0).all()


def test_the_answers_are_those_of_the_inverse() -> None:
    _, x = layer()
    moments = Moments.of(x)
    U, damping = moments.answers()
    damped = moments.H.double() + damping * moments.H.double().diagonal().mean() * torch.eye(256)
    assert damping == DAMPING
    torch.testing.assert_close(U.double().T @ U.double() @ damped, torch.eye(256).double(), rtol=0, atol=1e-3)


def test_inputs_that_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs of a matrix with 4 columns overflow or are no numbers"):
        Moments.of(torch.tensor([[1.0, 2.0, torch.nan, 0.0]]))

"""Orders of summation: the same function, other bits, the same at every run; and what a yardstick makes of them."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.model.matvec import library_product
from llama_ref.checkpoint import Checkpoint
from llama_ref.model import Llama
from oracle.questions.cases import random_row
from oracle.statistics.orders import Order, selected
from oracle.subjects.adapters import RefSubject, Yardstick

TOKENS = torch.tensor([random_row(257, 50, 1), random_row(257, 50, 2)])


def logits(checkpoint: Checkpoint, dtype: torch.dtype, order: int) -> Tensor:
    with Order(order):
        return Llama(checkpoint.config, checkpoint.weights, dtype)(TOKENS)


@pytest.mark.parametrize("order", [2, 4, 6])
def test_an_order_changes_nothing_but_rounding(order: int, tiny: Checkpoint) -> None:
    truth = logits(tiny, torch.float64, 0)
    torch.testing.assert_close(logits(tiny, torch.float64, order), truth, rtol=1e-12, atol=1e-12)
    errors = [(logits(tiny, torch.float32, n).double() - truth).norm() / truth.norm() for n in (0, order)]
    assert 0.3 < float(errors[1] / errors[0]) < 3
    assert not torch.equal(logits(tiny, torch.float32, order), logits(tiny, torch.float32, 0))


def test_orders_are_the_same_at_every_run_and_differ_from_each_other(tiny: Checkpoint) -> None:
    found = [logits(tiny, torch.float32, order) for order in (1, 2, 3)]
    again = [logits(tiny, torch.float32, order) for order in (1, 2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_an_order_reaches_our_products_of_few_rows(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 96, generator=generator), torch.randn(40, 96, generator=generator)
    with torch.no_grad():
        plain = library_product(x, weight)
        found = []
        for seed in (1, 2):
            with Order(seed):
                found.append(library_product(x, weight))
    assert not torch.equal(found[0], plain) and not torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], plain, rtol=1e-4, atol=1e-4)


def test_order_0_is_the_librarys_own(tiny: Checkpoint) -> None:
    assert torch.equal(logits(tiny, torch.float32, 0), Llama(tiny.config, tiny.weights, torch.float32)(TOKENS))


@pytest.mark.parametrize("causal, masked, grouped", [(True, False, False), (False, True, True), (False, False, True)])
def test_attention_written_out_is_attention(causal: bool, masked: bool, grouped: bool) -> None:
    order = next(Order(seed) for seed in range(1, 50) if Order(seed).writes_attention_out)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 7, 8, generator=generator)
    k, v = (torch.randn(2, 2 if grouped else 4, 7, 8, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, 7, 7, generator=generator) < 0.7 if masked else None
    mask = None if mask is None else mask | torch.eye(7, dtype=torch.bool)
    told = {"attn_mask": mask, "is_causal": causal, "enable_gqa": grouped}
    wanted = F.scaled_dot_product_attention(q, k, v, **told)  # type: ignore[arg-type]
    with order:
        found = F.scaled_dot_product_attention(q, k, v, **told)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_yardstick_shows_every_order(tiny: Checkpoint) -> None:
    rows = [random_row(257, 20, 1), random_row(257, 13, 2)]
    yardstick = Yardstick(tiny.config, tiny.weights, torch.float32, orders=3)
    found = yardstick.prefill_logits(rows)
    assert [tuple(row.shape) for row in found] == [(3, 20, 257), (3, 13, 257)]
    plain = RefSubject(tiny.config, tiny.weights, torch.float32).prefill_logits(rows)
    assert torch.equal(found[1][0], plain[1]) and not torch.equal(found[1][1], plain[1])


def test_the_float64_truth_holds_one_block_at_a_time(tiny: Checkpoint) -> None:
    """What lets a model that is too large in float64 be judged in float64."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    class Source:
        dtype = torch.float32

        def __init__(self, stored: Tensor):
            self.stored = stored
            self.shape = tuple(stored.shape)

        def __getitem__(self, key: object) -> Tensor:
            nonlocal most
            tensor = self.stored.clone()
            alive.add(tensor)
            most = max(most, len(alive))
            return tensor

    subject = RefSubject(tiny.config, {name: Source(source[:]) for name, source in tiny.weights.items()}, torch.float64)
    subject.prefill_logits([[1, 2, 3]])
    of_a_block = 9
    assert len(tiny.weights) == 2 * of_a_block + 3
    assert 0 < most <= of_a_block + 1


def test_a_transposed_matrix_is_permuted_as_any_other() -> None:
    weight, part = torch.randn(7, 5), torch.tensor([3, 0, 4])
    assert torch.equal(selected(weight.T, -2, part), weight.T[part])
    assert torch.equal(selected(weight, -2, part), weight[part])
    assert torch.equal(selected(weight, -1, part), weight[:, part])

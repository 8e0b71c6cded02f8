"""The sums against PyTorch's attention, and where they are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import inductor_prims  # noqa: F401 - as `Compiled` does

from llama_fast.model import attention
from llama_fast.model.attention import FEW_SLOTS, attend, attend_by_sums


def inputs(B: int, T: int, H: int, K: int, S: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unequal rows: each sees another number of slots."""
    draw = torch.Generator().manual_seed(S + d)
    q, k, v = (torch.randn(shape, generator=draw).to(dtype) for shape in ((B, T, H, d), (B, K, S, d), (B, K, S, d)))
    end_BT = torch.arange(B)[:, None] * 5 + torch.arange(T) + 3
    return q, k, v, (torch.arange(S) <= end_BT[..., None])[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "K", "d"), [(9, 3, 24), (4, 4, 16), (6, 1, 80)])
def test_sums_are_the_published_attention(H: int, K: int, d: int, dtype: torch.dtype) -> None:
    q, k, v, mask = inputs(3, 1, H, K, 40, d, dtype)
    found = attend_by_sums(q.view(3, K, H // K, d), k, v, mask)
    assert found.dtype is dtype
    each = (tensor.double().repeat_interleave(H // K, 1) for tensor in (k, v))
    truth = F.scaled_dot_product_attention(q.double().transpose(1, 2), *each, attn_mask=mask)
    error = (found.double().view(3, H, d) - truth.view(3, H, d)).abs().max()
    assert error < (1e-6 if dtype is torch.float32 else 2**-8 * truth.abs().max())


def test_a_slot_that_is_masked_weighs_nothing() -> None:
    q, k, v, mask = inputs(2, 1, 4, 2, 20, 8, torch.float32)
    hidden = ~mask[:, 0, 0, None, :, None].expand_as(k)
    first, other = (attend_by_sums(q.view(2, 2, 2, 8), k, v.masked_fill(hidden, x), mask) for x in (0.0, 1e30))
    assert torch.equal(first, other)


@pytest.mark.parametrize(
    ("B", "T", "S", "compiling", "by_sums"),
    [
        (1, 1, FEW_SLOTS, True, True),
        (2, 1, FEW_SLOTS // 2, True, True),
        (2, 1, FEW_SLOTS, True, False),
        (1, 2, 32, True, False),
        (1, 1, 32, False, False),
    ],
)
def test_sums_are_taken_for_one_token_and_few_slots(
    B: int, T: int, S: int, compiling: bool, by_sums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(attention, "attend_by_sums", lambda *given: calls.append(given) or attend_by_sums(*given))
    q, k, v, mask = inputs(B, T, 6, 2, S, 8, torch.float32)
    found = attend(q, k, v, mask)
    assert bool(calls) is by_sums
    each = (tensor.repeat_interleave(3, 1) for tensor in (k, v))
    truth = F.scaled_dot_product_attention(q.transpose(1, 2), *each, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(found, truth)

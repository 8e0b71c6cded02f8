"""`accept` by exact enumeration: what is emitted has the target's law to 1e-12; each known defect has another law."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_fast.engine.sampling import draw
from llama_fast.speculative.acceptance import accept, accept_greedy, emitted, leading
from oracle.statistics.rejection import Accept, Tables, emitted_law, worst_error


def tables(V: int, K: int, seed: int, zeros: float = 0.0) -> Tables:
    """Random conditional laws; `zeros` is the share of impossible tokens (as top-k and top-p make them)."""
    generator = torch.Generator().manual_seed(seed)

    def law(*shape: int) -> Tensor:
        weight = torch.rand(shape, dtype=torch.float64, generator=generator) ** 3
        weight = torch.where(torch.rand(shape, generator=generator) < zeros, 0.0, weight)
        weight[..., int(torch.randint(V, (), generator=generator))] += 0.01
        return weight / weight.sum(-1, keepdim=True)

    return Tables([law(*[V] * (i + 1)) for i in range(K + 1)], [law(*[V] * (i + 1)) for i in range(K)])


@settings(max_examples=25)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 0.6]))
def test_what_is_emitted_has_the_targets_joint_law(V: int, K: int, seed: int, zeros: float) -> None:
    chosen = tables(V, K, seed, zeros)
    law = emitted_law(accept, chosen)
    assert law.shape == (V,) * (K + 1)
    torch.testing.assert_close(law, chosen.joint, atol=1e-12, rtol=0)


@settings(max_examples=10)
@given(st.integers(2, 4), st.integers(1, 2), st.integers(0, 10**6), st.sampled_from([0.0, 0.3]))
def test_a_certain_proposal_is_a_one_hot_law(V: int, K: int, seed: int, zeros: float) -> None:
    """What a lookup proposes, it proposes with probability 1."""
    certain = [torch.zeros([V] * (i + 1), dtype=torch.float64) for i in range(K)]
    for i, law in enumerate(certain):
        law[..., (seed + i) % V] = 1
    chosen = Tables(tables(V, K, seed, zeros).target, certain)
    assert worst_error(accept, chosen) < 1e-12


@settings(max_examples=5)
@given(st.integers(0, 10**6))
def test_the_targets_own_proposals_always_stand(seed: int) -> None:
    chosen = tables(4, 2, seed)
    same = Tables(chosen.target, chosen.target[:2])
    assert worst_error(accept, same) < 1e-12
    p_BTV = torch.stack([chosen.target[0], *chosen.target[1][:2]])[None].expand(5, -1, -1)
    u_BT = torch.full((5, 3), 1 - 2.0**-53, dtype=torch.float64)
    assert accept(torch.tensor([[1, 2]] * 5), p_BTV[:, :2], p_BTV, u_BT)[1].tolist() == [3] * 5


def test_float32_that_falls_by_rounding_alone_still_draws_a_possible_token() -> None:
    p = torch.tensor([0.25, 0.0, 0.75, 0.0])
    q = p * (1 + 2e-7)
    u = torch.tensor([[1 - 2.0**-53, 0.9], [0.1, 0.1]], dtype=torch.float64)
    tokens, count = accept(torch.tensor([[0], [2]]), q.expand(2, 1, 4), p.expand(2, 2, 4), u)
    assert count.tolist() == [1, 2] and tokens[0, 0] == 2 and tokens[1].tolist() == [2, 0]


def test_rows_are_judged_each_on_its_own() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64).expand(3, 3, 3)
    q = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
    u = torch.full((3, 3), 0.25, dtype=torch.float64)
    tokens, count = accept(torch.tensor([[1, 0], [0, 0], [1, 1]]), q, p, u)
    assert count.tolist() == [3, 1, 2]
    assert tokens[0].tolist() == [1, 0, 2] and tokens[1, :1].tolist() == [1] and tokens[2, :2].tolist() == [1, 0]


@given(st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=2, max_size=5), st.integers(0, 4))
def test_greedy_is_acceptance_with_one_hot_laws(rows: list[list[int]], K: int) -> None:
    draft, best = torch.tensor(rows)[:, :K], torch.tensor(rows)[:, 4 : 5 + K]
    hot = torch.nn.functional.one_hot
    u = torch.rand(len(rows), K + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(K))
    tokens, count = accept_greedy(draft, best)
    same, number = accept(draft, hot(draft, 3).double(), hot(best, 3).double(), u)
    assert count.tolist() == number.tolist() and torch.equal(tokens, same)
    for row, (proposed, n) in enumerate(zip(draft.tolist(), count.tolist())):
        kept = tokens[row, :n].tolist()
        assert kept == best[row, :n].tolist() and kept[:-1] == proposed[: n - 1]
        assert n == K + 1 or proposed[n - 1] != best[row, n - 1]


def faulty(
    judge: Callable[[Tensor, Tensor], Tensor], rest: Callable[[Tensor, Tensor], Tensor], bonus: int = 0
) -> Accept:
    """`accept` with a part exchanged; `bonus` shifts the place whose target law the last token is drawn from."""

    def run(draft_BK: Tensor, q_BKV: Tensor, p_BTV: Tensor, u_BT: Tensor) -> tuple[Tensor, Tensor]:
        K, row_B = draft_BK.shape[1], torch.arange(len(draft_BK))
        q_BK = q_BKV.gather(-1, draft_BK[..., None])[..., 0]
        p_BK = p_BTV[:, :K].gather(-1, draft_BK[..., None])[..., 0]
        n_B = leading(judge(u_BT[:, :K] * q_BK, p_BK))
        q_BV = torch.cat([q_BKV, torch.zeros_like(q_BKV[:, :1])], 1)[row_B, n_B]
        rest_BV = rest(p_BTV[row_B, (n_B + bonus).clamp(max=K)], q_BV)
        rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, torch.ones_like(rest_BV))
        return emitted(draft_BK, n_B, draw(rest_BV, u_BT[:, K])), n_B + 1

    return run


def right(u: Tensor, p: Tensor) -> Tensor:
    return u < p


def residual(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).clamp(min=0)


def last_unjudged(u: Tensor, p: Tensor) -> Tensor:
    return torch.cat([u[:, :-1] < p[:, :-1], torch.ones_like(u[:, :1], dtype=torch.bool)], 1)


def first_unjudged(u: Tensor, p: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(u[:, :1], dtype=torch.bool), u[:, 1:] < p[:, 1:]], 1)


DEFECTS = {
    "the first proposal is never judged": faulty(first_unjudged, residual),
    "off by one at the last candidate": faulty(last_unjudged, residual),
    "a fallen token is drawn from the target's law": faulty(right, lambda p, q: p),
    "the rest is the absolute difference": faulty(right, lambda p, q: (p - q).abs()),
    "the rest is of the next place": faulty(right, residual, bonus=1),
    "a token stands if the target finds it likelier": faulty(lambda u, p: p > 0.3, residual),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_known_defect_has_another_law(defect: str) -> None:
    assert worst_error(faulty(right, residual), tables(3, 2, 5)) < 1e-12, "without a defect the harness is right"
    assert worst_error(DEFECTS[defect], tables(3, 2, 5)) > 1e-3

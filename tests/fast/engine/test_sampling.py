"""Sampling by laws: the hash against published vectors, the draw against exact probabilities, rows on their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama_fast.arithmetic.pytorch import Operators, PyTorch
from llama_fast.build import build
from llama_fast.contracts import Slots
from llama_fast.engine.sampling import (
    MASK_32,
    BatchSampler,
    Code,
    Sampling,
    draw,
    keep_nucleus,
    philox,
    uniform,
    unpacked,
)
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.generate import Adjusted

CPU = torch.device("cpu")


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK_32,) * 4, (MASK_32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert tuple(int(word) for word in philox(words(*counter), words(*key))) == expected  # type: ignore[arg-type]


def test_uniforms_are_uniform_and_differ_by_seed_position_and_stream() -> None:
    position = torch.arange(20000)
    key = torch.tensor([[5, 0]]).expand(20000, 2)
    u = uniform(key, position)
    assert u.dtype is torch.float64 and float(u.min()) >= 0 and float(u.max()) < 1
    counts = torch.histc(u, 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 56  # chi square, 19 degrees: false alarm 1.6e-5 if random
    assert not torch.equal(u, uniform(key, position, stream=1))
    assert not torch.equal(u, uniform(key + torch.tensor([1, 0]), position))


def test_uniforms_looked_up_are_those_hashed() -> None:
    hashed, looked_up = (BatchSampler(Sampling(0.7, seed=2**40), [2**40, 9, 11], CPU) for _ in range(2))
    looked_up.look_ahead(40)
    position = torch.tensor([[0, 39, 7, 7, 12], [5, 1, 38, 0, 39], [3, 3, 3, 20, 21]])
    stream = torch.tensor([0, 3, 1, 2, 0])
    u = hashed.uniforms(position, stream)
    assert u.unique().numel() == 15
    assert torch.equal(looked_up.uniforms(position, stream), u)
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for at in (torch.tensor([0, 39, 17]), torch.tensor([5, 5, 6])):
        assert torch.equal(hashed(logits, at), looked_up(logits, at))


def test_greedy_is_the_argmax_with_the_lowest_id_on_a_tie() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, -1.0, 2.0, 2.0]])
    choose = BatchSampler(Sampling(), [1, 2], CPU)
    assert choose(logits, torch.tensor([4, 9])).tolist() == [1, 0]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9).filter(lambda p: sum(p) > 0.01), st.integers(50, 400))
def test_draw_hits_each_token_in_proportion(weights: list[float], points: int) -> None:
    """Over an even grid of u, each token's count is its probability to within one grid point."""
    p = torch.tensor(weights, dtype=torch.float64)
    p = p / p.sum()
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    tokens = draw(p.expand(points, -1), u)
    counts = torch.bincount(tokens, minlength=len(p))
    assert ((counts - points * p).abs() <= 1 + 1e-9).all()
    assert (p[tokens] > 0).all()


class Recording:
    """Kernels that only tell who asked."""

    MOST_VOCABULARY = 8

    def __init__(self) -> None:
        self.asked: list[str] = []

    def distribution(self, logits: Tensor, temperature: Tensor, top_k: Tensor | None, min_p: Tensor | None) -> Tensor:
        told = (None if values is None else [round(value, 1) for value in values.tolist()] for values in (top_k, min_p))
        self.asked.append(" ".join(["law", *(f"{warmth:.1f}" for warmth in temperature.tolist()), *map(str, told)]))
        return torch.nn.functional.one_hot(logits.argmin(-1), logits.shape[-1]).float()

    def draw(self, p: Tensor, uniform: Tensor) -> Tensor:
        self.asked.append("draw")
        return p.argmax(-1)

    def likeliest(self, logits: Tensor) -> Tensor:
        self.asked.append("likeliest")
        return logits.argmax(-1)


def test_kernels_choose_where_they_can() -> None:
    """A law not behind a nucleus, nothing above their vocabulary."""

    def chosen(sampling: Sampling, vocab: int) -> tuple[list[int], list[str]]:
        choose, kernels = BatchSampler(sampling, [1, 2], CPU), Recording()
        choose.kernels = kernels
        logits_BV = torch.tensor([[5.0, 1.0, -40.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], [-40.0, 1.0, 2.0, 60.0, *[1.0] * 5]])
        return choose(logits_BV[:, :vocab], torch.tensor([4, 9])).tolist(), kernels.asked

    assert chosen(Sampling(0.7, top_k=3, min_p=0.5), 8) == ([2, 0], ["law 0.7 0.7 [3, 3] [0.5, 0.5]", "draw"])
    assert chosen(Sampling(0.7), 4) == ([2, 0], ["law 0.7 0.7 None None", "draw"])
    assert chosen(Sampling(0.1, top_p=0.5), 8) == ([0, 3], ["draw"])
    assert chosen(Sampling(0.1), 9) == ([0, 3], [])
    assert chosen(Sampling(0.0), 8) == ([0, 3], ["likeliest"])


def test_a_plan_with_kernels_hands_them_to_its_choosers(untied: Checkpoint) -> None:
    class Having(Operators):
        sampling_kernels = Recording()  # type: ignore[assignment]

    @dataclass(frozen=True)
    class WithKernels(PyTorch):
        def bind(self, config: LlamaConfig, slots: Slots, device: torch.device) -> Operators:
            return Having(**vars(super().bind(config, slots, device)))

    for arithmetic, kernels in ((PyTorch(), None), (WithKernels(), Having.sampling_kernels)):
        runner = build(untied, Plan(arithmetic=arithmetic), "cpu")
        assert runner.prepared(BatchSampler(Sampling(0.7), [1], CPU), 9).kernels is kernels


def test_draw_never_gives_a_token_of_probability_zero() -> None:
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert draw(p, torch.tensor([0.0, 0.0], dtype=torch.float64)).tolist() == [1, 3]
    assert draw(p, torch.tensor([1 - 2**-53, 1 - 2**-53], dtype=torch.float64)).tolist() == [2, 3]


def test_the_nucleus_is_the_fewest_that_reach_p() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    torch.testing.assert_close(keep_nucleus(p, torch.tensor(0.7)), torch.tensor([[0.0, 0.625, 0.375], [0.0, 0.0, 1.0]]))


def test_top_k_and_temperature_shape_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    p = BatchSampler(Sampling(temperature=0.5, top_k=2), [0, 1], CPU).probabilities(logits)
    torch.testing.assert_close(p[0], torch.tensor([0, 0, *torch.tensor([4.0, 6.0]).softmax(0).tolist()]))
    assert (p[1].flip(0) == p[0]).all()


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    position = torch.tensor([3, 8, 1])
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.9)
    together = BatchSampler(sampling, [4, 5, 6], CPU)(logits, position)
    for b in range(3):
        assert BatchSampler(sampling, [4 + b], CPU)(logits[b : b + 1], position[b : b + 1]) == together[b]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_requests_fail_at_construction(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)  # type: ignore[arg-type]


MIXTURE = [
    Sampling(0.0, seed=3),
    Sampling(0.8, top_k=5, seed=4),
    Sampling(1.2, top_p=0.7, seed=2**40 + 5),
    Sampling(0.9, top_k=2, top_p=0.9, min_p=0.05, seed=6),
    Sampling(1.5, min_p=0.1, seed=7),
    Sampling(1.0, top_k=999, seed=8),
    Sampling(0.0, repetition_penalty=1.5, seed=9),
    Sampling(1.1, seed=10),
]
WRITTEN = [[1, 2], [3], [4, 5, 6], [7], [8], [9], [10, 11, 12], [13]]


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("ahead", [0, 64])
def test_rows_with_other_settings_choose_to_the_bit_as_they_do_alone(steady: bool, ahead: int) -> None:
    """Also those set while others run, in any order, and beside rows that nobody asks for any more."""
    generator = torch.Generator().manual_seed(1)
    mixed = BatchSampler.of_free_rows(len(MIXTURE), CPU, 40)
    mixed.steady = steady
    if ahead:
        mixed.look_ahead(ahead)
    compared = 0
    for joining in (5, 0, 3, 1, 7, 2, 6, 4, None, 3, 0):
        if joining is None:
            for b in (0, 3):
                mixed.free_row(b)
        else:
            mixed.set_rows(joining, [MIXTURE[joining]], [WRITTEN[joining]])
        for _ in range(6):
            logits = 3 * torch.randn(8, 40, generator=generator)
            position = torch.randint(0, 60, (8,), generator=generator)
            tokens, p = mixed(logits, position), mixed.probabilities(logits)
            for b, one in enumerate(MIXTURE):
                if mixed.settings[b] is not None:
                    alone = BatchSampler(one, [one.seeds(1)[0]], CPU, [WRITTEN[b]], 40)
                    assert alone(logits[b : b + 1], position[b : b + 1]) == tokens[b], b
                    if one.temperature:
                        assert torch.equal(alone.probabilities(logits[b : b + 1])[0], p[b]), b
                    compared += 1
    assert compared > 200


def test_rows_that_filter_alike_need_no_more_code_than_one() -> None:
    for one in MIXTURE:
        choose = BatchSampler(one, [1, 2, 3], CPU, [[1]] * 3, 40)
        assert not choose.code.mixed and choose.code == BatchSampler(one, [1], CPU, [[1]], 40).code
    warm = BatchSampler.of_free_rows(2, CPU, 40)
    warm.set_rows(0, [Sampling(0.5, top_k=7, seed=1), Sampling(1.5, top_k=7, seed=2)])
    assert not warm.code.mixed


def test_code_that_was_compiled_becomes_code_for_any_settings_and_stays() -> None:
    choose = BatchSampler.of_free_rows(3, CPU, 5000)
    choose.steady = True
    codes = []
    for i, one in enumerate([*MIXTURE, *MIXTURE, Sampling(1.0, top_k=300)]):
        choose.set_rows(i % 3, [one], [[1]])
        codes.append(choose.code)
        choose.free_row((i + 1) % 3)
    assert len(set(codes)) == 3  # greedy; any settings; any, and k up to 1024
    assert codes[-1].top_k == 1024 and codes[5:] == [codes[5]] * len(codes[5:])


def test_some_rows_of_a_sampler_stay_its_own() -> None:
    choose = BatchSampler.of_free_rows(4, CPU, 40)
    choose.set_rows(0, MIXTURE[3:7], WRITTEN[3:7])
    part, logits = choose.rows(2, 2), torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    position = torch.arange(4)
    assert torch.equal(part(logits[2:], position[2:]), choose(logits, position)[2:])
    part.note(torch.tensor([0, 39]))
    assert choose.seen_BV is not None and choose.seen_BV[3].nonzero()[:, 0].tolist() == [10, 11, 12, 39]


ADJUSTED = st.builds(
    Adjusted,
    st.sampled_from([1.0, 1.3, 0.8]),
    st.sampled_from([0.0, 0.7, -1.1]),
    st.sampled_from([0.0, 1.9, -0.4]),
    st.dictionaries(st.integers(0, 8), st.sampled_from([-100.0, -1.5, 0.25, 100.0]), max_size=3),
)
ROW = st.tuples(ADJUSTED, st.lists(st.integers(0, 8), min_size=1, max_size=6), st.sampled_from([0.0, 0.8]))


def sampling_of(wanted: Adjusted, temperature: float, seed: int) -> Sampling:
    return Sampling(
        temperature,
        seed=seed,
        repetition_penalty=wanted.repetition_penalty,
        frequency_penalty=wanted.frequency_penalty,
        presence_penalty=wanted.presence_penalty,
        logit_bias=wanted.logit_bias,
    )


@given(st.lists(ROW, min_size=2, max_size=4), st.integers(0, 2**30), st.booleans())
def test_unequal_rows_have_the_references_logits_at_every_step(
    rows: list[tuple[Adjusted, list[int], float]], seed: int, steady: bool
) -> None:
    """Every row with its own bias and penalties; each joins alone, and one leaves and comes again with nothing written."""
    generator = torch.Generator().manual_seed(seed)
    choose = BatchSampler.of_free_rows(len(rows), CPU, 9)
    choose.steady = steady
    for b, (wanted, prompt, temperature) in enumerate(rows):
        choose.set_rows(b, [sampling_of(wanted, temperature, b)], [prompt])
    generated: list[list[int]] = [[] for _ in rows]
    for step in range(8):
        if step == 5:
            choose.free_row(0)
            choose.narrow()
            choose.set_rows(0, [sampling_of(rows[0][0], 0.0, 0)], [rows[0][1]])
            generated[0] = []
        logits = 4 * torch.randn(len(rows), 9, generator=generator)
        changed = choose.edited(logits)
        for b, (wanted, prompt, _) in enumerate(rows):
            expected = wanted.of(logits[b], prompt, generated[b])
            torch.testing.assert_close(changed[b].double(), expected, rtol=1e-5, atol=1e-5)
        tokens = choose(logits, torch.full((len(rows),), step))
        assert torch.equal(tokens[choose.temperature_B == 0], changed.argmax(-1)[choose.temperature_B == 0])
        choose.note(tokens)
        for row, token in zip(generated, tokens.tolist(), strict=True):
            row.append(token)


def test_who_asks_for_nothing_has_nothing_kept_and_its_logits_untouched() -> None:
    choose = BatchSampler.of_free_rows(2, CPU, 40)
    choose.set_rows(0, [Sampling(), Sampling(0.7, top_k=3)], [[1], [2]])
    logits = torch.randn(2, 40, dtype=torch.bfloat16)
    assert choose.edited(logits) is logits and not choose.code.edited
    choose.note(torch.tensor([3, 4]))
    assert choose.count_BV is choose.bias_BV is choose.seen_BV is None


def test_a_row_that_goes_on_elsewhere_keeps_its_counts() -> None:
    """It comes to another slot with what it has generated; the slot's counts of the row before are gone."""
    choose = BatchSampler.of_free_rows(2, CPU, 5)
    settings = [Sampling(frequency_penalty=1.0, presence_penalty=0.5), Sampling(frequency_penalty=2.0)]
    choose.set_rows(0, settings, [[4], [4]])
    choose.note(torch.tensor([1, 2]))
    choose.set_rows(1, settings[:1], [[4, 1, 3, 3]], [[1, 3, 3]])
    assert choose.edited(torch.zeros(2, 5)).tolist() == [[0, -1.5, 0, 0, 0], [0, -1.5, 0, -2.5, 0]]


def test_a_bias_does_not_outlive_its_row() -> None:
    """Row 0's is gone when another row stands there, also if that one came while nobody had a bias."""
    choose = BatchSampler.of_free_rows(2, CPU, 5)
    choose.set_rows(0, [Sampling(logit_bias={1: 9.0})], [[0]])
    choose.free_row(0)
    choose.narrow()
    choose.set_rows(0, [Sampling()], [[0]])
    choose.set_rows(1, [Sampling(logit_bias={2: 9.0})], [[0]])
    assert choose(torch.zeros(2, 5), torch.tensor([1, 1])).tolist() == [0, 2]


def test_some_rows_count_in_the_whole_samplers_memory() -> None:
    choose = BatchSampler.of_free_rows(4, CPU, 6)
    choose.set_rows(0, [Sampling(frequency_penalty=1.0, logit_bias={b: 0.5}) for b in range(4)], [[0]] * 4)
    part = choose.rows(2, 2)
    part.note(torch.tensor([5, 5]))
    part.note(torch.tensor([5, 1]))
    assert choose.count_BV is not None and choose.count_BV.nonzero().tolist() == [[2, 5], [3, 1], [3, 5]]
    logits = torch.zeros(4, 6)
    assert torch.equal(part.edited(logits[2:]), choose.edited(logits)[2:])
    assert float(choose.edited(logits)[2, 5]) == -2.0


class Allowing:
    """A constraint that is only looked at."""

    ends = (0,)

    def begin(self) -> Any:
        raise AssertionError("a sampler begins no row")


def test_a_mask_leaves_what_it_allows_and_no_other_row_is_changed() -> None:
    allowed = torch.tensor([[True, False] * 35, [True] * 70, [False] * 69 + [True]])
    bits = (torch.nn.functional.pad(allowed, (0, 26)).view(3, 3, 32).long() << torch.arange(32)).sum(-1)
    words = (bits - (bits >= 2**31).long() * 2**32).to(torch.int32)
    assert torch.equal(unpacked(words, 70), allowed)
    choose = BatchSampler.of_free_rows(3, CPU, 70)
    choose.allowed = lambda first, count: words[first : first + count]
    settings = [
        Sampling(0.9, top_k=40, seed=1, grammar=Allowing()),
        Sampling(1.1, seed=2),
        Sampling(grammar=Allowing()),
    ]
    choose.set_rows(0, settings, [[1], [2], [3]])
    plain = BatchSampler(Sampling(1.1), [2], CPU)
    for step in range(30):
        logits, at = torch.randn(3, 70), torch.full((3,), step)
        tokens = choose(logits, at)
        assert tokens[0] % 2 == 0 and tokens[1] == plain(logits[1:2], at[1:2])[0] and tokens[2] == 69
        assert choose.rows(1, 2)(logits[1:], at[1:]).tolist() == tokens[1:].tolist()


def test_code_that_was_compiled_is_kept_while_edits_come_and_go() -> None:
    """They are made behind the compiled step, which then is the one of greedy rows: no settings compile another program."""
    choose = BatchSampler.of_free_rows(2, CPU, 40)
    choose.steady = True
    choose.set_rows(0, [Sampling(0.7)], [[1]])
    drawn = choose.code
    for one in (
        Sampling(0.7, frequency_penalty=0.5),
        Sampling(0.7, logit_bias={3: 1}),
        Sampling(0.7, grammar=Allowing()),
    ):
        choose.set_rows(1, [one], [[1]])
        assert choose.is_apart and choose.code.with_edits_of(Code()) == drawn
        choose.free_row(1)
        choose.narrow()
        assert not choose.is_apart and choose.code == drawn


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        ({"presence_penalty": float("inf")}, "presence_penalty=inf"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: a token id=-1"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias: a token id='5'"),
        ({"logit_bias": {5: "1"}}, r"logit_bias\[5\]='1'"),
        ({"logit_bias": {5: float("inf")}}, r"logit_bias\[5\]=inf"),
        ({"logit_bias": [5]}, r"logit_bias=\[5\]"),
        ({"grammar": "a+"}, "grammar='a\\+'"),
    ],
)
def test_impossible_edits_fail_at_construction(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Sampling(**wrong)

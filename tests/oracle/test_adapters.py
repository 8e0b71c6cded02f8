"""The adapters say the same about one model: by prefill, through the cache, and in the generation loop."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch

from llama_fast.build import build
from llama_fast.plan import Plan
from llama_fast.recipes import optimised
from llama_ref.checkpoint import Checkpoint
from llama_ref.generate import greedy
from llama_ref.model import Llama
from oracle.questions.cases import Case, random_row, standard_case, text_rows
from oracle.questions.generation import judge_stopping
from oracle.questions.judge import Bench, judge
from oracle.questions.localise import first_beyond, judge_stages, judge_weights
from oracle.statistics.compare import Outcome
from oracle.subjects.adapters import ReadOnce, RefSubject, Weights
from oracle.subjects.fast import FastSubject
from oracle.subjects.others import CallableSubject
from oracle.subjects.subject import Setting, Subject

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tiny: Checkpoint) -> Bench:
    truth = RefSubject(tiny.config, tiny.weights, torch.float64)
    return Bench(truth, RefSubject(tiny.config, tiny.weights, torch.float32))


@pytest.fixture(scope="module")
def case(tiny: Checkpoint) -> Case:
    return standard_case(tiny.config.vocab_size, tiny.config.max_context)


def subjects(tiny: Checkpoint) -> list[Subject]:
    reference = Llama(tiny.config, tiny.weights, torch.float32)
    return [
        RefSubject(tiny.config, tiny.weights, torch.float32),
        CallableSubject(reference, tiny.config.vocab_size, torch.float32),
        FastSubject(build(tiny, Plan(), CPU, torch.float32)),
        FastSubject(build(tiny, optimised(), CPU, torch.float32), batch=1, cache_length=256),
        FastSubject(build(tiny, optimised(), CPU, torch.float32), batch=3),
    ]


@pytest.mark.parametrize("index", range(5), ids=["reference", "callable", "growing", "one row", "three rows"])
def test_every_subject_agrees_with_the_reference(index: int, tiny: Checkpoint, bench: Bench, case: Case) -> None:
    verdict = judge(subjects(tiny)[index], bench, case)
    assert verdict.outcome is Outcome.AGREE, verdict.failures


def test_the_standard_case_is_ragged_and_long_enough(case: Case) -> None:
    assert len(case.rows) >= 2
    assert len({len(row) for row in case.rows}) == len(case.rows)
    assert sum(map(len, case.rows)) >= 192
    assert all(1 <= start < end for split in case.splits for start, end in zip(split.starts, split.ends))
    assert case.rows == standard_case(257, 256).rows != standard_case(257, 256, seed=5).rows


@pytest.mark.parametrize("context", [16, 40, 64])
def test_a_short_context_gets_a_case_that_fits(context: int) -> None:
    case = standard_case(50, context)
    assert case.longest <= context
    assert all(len(row) >= 2 for row in case.rows)


def test_decoding_continues_where_prefill_ends(tiny: Checkpoint) -> None:
    rows = [random_row(257, 20, 1), random_row(257, 13, 2)]
    for subject in subjects(tiny):
        whole = subject.prefill_logits(rows)
        parts = subject.decode_logits(rows, [4, 11])
        assert [tuple(part.shape) for part in parts] == [(17, 257), (3, 257)]
        torch.testing.assert_close(parts[0], whole[0][3:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(parts[1], whole[1][10:], atol=1e-4, rtol=1e-4)


def test_greedy_is_the_references_own_greedy(tiny: Checkpoint) -> None:
    prompts = [random_row(257, 9, 1), random_row(257, 4, 2)]
    wanted = [greedy(Llama(tiny.config, tiny.weights, torch.float32), list(prompt), 8) for prompt in prompts]
    for subject in subjects(tiny):
        done = subject.greedy(prompts, 8)
        assert [tokens for tokens, _ in done] == wanted
        assert all(tuple(logits.shape) == (8, 257) for _, logits in done)
        assert all(logits.argmax(-1).tolist() == tokens for tokens, logits in done)


class Lazy:
    """A subject that answers less than it is asked."""

    name, vocab_size, dtype = "lazy", 257, torch.float32

    def __init__(self, subject: Subject):
        self.subject = subject

    def prefill_logits(self, rows: object) -> list[torch.Tensor]:
        return self.subject.prefill_logits(rows)[:1]  # type: ignore[arg-type]

    def decode_logits(self, rows: object, splits: object) -> list[torch.Tensor]:
        return [row[:-1] for row in self.subject.decode_logits(rows, splits)]  # type: ignore[arg-type]

    def greedy(self, prompts: object, n: int) -> list[tuple[list[int], torch.Tensor]]:
        return [([], torch.zeros(0, 257)) for _ in prompts]  # type: ignore[attr-defined]


def test_answering_less_is_no_way_to_pass(tiny: Checkpoint, bench: Bench, case: Case) -> None:
    lazy = Lazy(subjects(tiny)[0])
    rows = case.rows
    assert bench.prefill(lazy, rows).outcome is Outcome.DIFFER
    assert bench.decode(lazy, rows, case.splits[0].starts, case.splits[0].ends).outcome is Outcome.DIFFER
    assert bench.greedy(lazy, case.prompts, 5).outcome is Outcome.EMPTY
    assert bench.prefill(lazy, []).outcome is Outcome.EMPTY


@pytest.mark.parametrize(
    "cut, told",
    [
        (lambda done: [done[0], (done[1][0][:2], done[1][1][:2])], "row 1: 2 tokens, asked 5"),
        (lambda done: [done[0], (done[1][0] + [0], done[1][1])], "row 1: 6 tokens, asked 5"),
        (lambda done: done[:1], "1 rows, asked 2"),
        (lambda done: [*done, done[0]], "3 rows, asked 2"),
    ],
)
def test_greedy_tokens_are_as_many_as_asked(
    cut: Any, told: str, tiny: Checkpoint, bench: Bench, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subjects(tiny)[0]
    whole = subject.greedy
    monkeypatch.setattr(subject, "greedy", lambda prompts, n: cut(whole(prompts, n)))
    verdict = bench.greedy(subject, case.prompts, 5)
    assert verdict.outcome is Outcome.DIFFER
    assert verdict.failures[0].where == told


@pytest.mark.parametrize("said", [[[], []], [[3, 4, 5], []], [[3, 4, 5]], []])
def test_a_loop_that_says_too_little_has_no_ends_to_judge(said: list[list[int]]) -> None:
    class Terse:
        def sample(self, prompts: object, n: int, setting: Setting, seed: int) -> list[tuple[list[int], torch.Tensor]]:
            return []

        def until(self, prompts: object, n: int, eos_ids: object) -> list[tuple[list[int], str]]:
            return [(tokens, "length") for tokens in said]

    assert judge_stopping(Terse(), [[1, 2], [3]], 3).outcome is Outcome.DIFFER


def test_rows_lost_at_an_end_differ() -> None:
    class Losing:
        def sample(self, prompts: object, n: int, setting: Setting, seed: int) -> list[tuple[list[int], torch.Tensor]]:
            return []

        def until(self, prompts: object, n: int, eos_ids: Collection[int]) -> list[tuple[list[int], str]]:
            return [([3, 4, 5], "length")] if eos_ids else [([3, 4, 5], "length"), ([6, 7, 8], "length")]

    assert judge_stopping(Losing(), [[1, 2], [3]], 3).outcome is Outcome.DIFFER


def test_a_subject_that_shows_whole_blocks_is_judged_block_by_block(tiny: Checkpoint) -> None:
    fast = FastSubject(build(tiny, optimised(), CPU, torch.float32))
    rows = [random_row(257, 40, 1), random_row(257, 31, 2)]
    truth, plain = (RefSubject(tiny.config, tiny.weights, dtype) for dtype in (torch.float64, torch.float32))
    traces = [
        {stage: value for stage, value in trace.items() if stage in ("embedding", "layers.0", "layers.1", "logits")}
        for trace in fast.trace(rows, [30, 31])
    ]
    stages = judge_stages(rows, traces, truth, plain, 2, 2**-24)
    assert [stage.name for stage in stages] == ["embedding", "layers.0", "layers.1", "logits"]
    assert first_beyond(stages) is None
    for trace in traces:
        trace["layers.1"] = trace["layers.1"] * (1 + 1e-5)
    fault = first_beyond(judge_stages(rows, traces, truth, plain, 2, 2**-24))
    assert fault is not None and fault.name == "layers.1"


@pytest.mark.parametrize("at", ["first", "second", "third"])
def test_a_weight_that_is_no_number_differs_wherever_it_stands(at: str) -> None:
    original = {name: torch.ones(2, 3) for name in ("first", "second", "third")}
    held = {name: weight * torch.nan if name == at else weight for name, weight in original.items()}
    assert judge_weights(original, original, 0.0).outcome is Outcome.AGREE
    verdict = judge_weights(held, original, 1e-2)
    assert verdict.outcome is Outcome.DIFFER and verdict.checks[0].where == at


def test_weights_are_rounded_to_the_subjects_type_whether_kept_or_not(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Weights(tiny.weights, torch.bfloat16, CPU)
    monkeypatch.setattr("oracle.subjects.adapters.HELD_BYTES", 0)
    made_anew = Weights(tiny.weights, torch.bfloat16, CPU)
    assert list(kept) == list(made_anew) == list(tiny.weights)
    for name in kept:
        assert kept[name].dtype is torch.bfloat16
        assert torch.equal(kept[name], made_anew[name])
        assert kept[name] is kept[name] and made_anew[name] is not made_anew[name]


def test_the_text_gives_rows_of_the_lengths_asked_for() -> None:
    rows = text_rows(lambda text: list(text.encode()), (256,) * 4)
    assert [len(row) for row in rows] == [256] * 4
    assert len(set(rows)) == 4


def test_rows_are_judged_together_as_each_would_be_alone(tiny: Checkpoint) -> None:
    """One product for all rows; positions, attention and what a row has shown stay its own."""
    truth = RefSubject(tiny.config, tiny.weights, torch.float64)
    rows = [[5, 9, 200, 31, 7], [1, 2], [250, 3, 3, 8]]
    seen: list[dict[str, torch.Tensor]] = [{"embedding": value} for value in truth.embeddings(rows)]
    seen[1]["layers.0.q"] = torch.full((2, 4 * 24), 0.5, dtype=torch.float64)  # shown by one row alone
    together = truth.stages_of_block(0, seen)
    for row, trace in enumerate(seen):
        (alone,) = truth.stages_of_block(0, [trace])
        assert alone.keys() == together[row].keys()
        for stage, value in alone.items():
            assert value.shape[0] == len(rows[row])
            torch.testing.assert_close(together[row][stage], value, rtol=1e-11, atol=1e-12, msg=f"row {row}, {stage}")
    free = truth.stages_of_block(0, [{"embedding": truth.embeddings(rows)[1]}])[0]
    assert not torch.equal(free["layers.0.attention"], together[1]["layers.0.attention"])  # the query shown was taken
    ends = truth.stages_of_ends(
        rows, [{}, {"layers.1": together[1]["layers.0"]}, {"layers.1": together[2]["layers.0"]}]
    )
    assert [set(trace) for trace in ends] == [{"embedding"}, *[{"embedding", "norm", "logits"}] * 2]
    (alone,) = truth.stages_of_ends(rows[2:], [{"layers.1": together[2]["layers.0"]}])
    torch.testing.assert_close(ends[2]["logits"], alone["logits"], rtol=1e-11, atol=1e-12)


def test_a_tensor_of_a_file_is_read_once_and_given_as_a_copy() -> None:
    class Source:
        shape, dtype, read = (4, 2), torch.float32, 0

        def __getitem__(self, key: object) -> torch.Tensor:
            self.read += 1
            return torch.arange(8.0).view(4, 2)[key]  # type: ignore[index]

    source, memory = Source(), torch.ones(3)
    held = ReadOnce({"file": source, "memory": memory})
    held["file"][:].zero_()
    assert held["file"][:].tolist() == torch.arange(8.0).view(4, 2).tolist() and source.read == 1
    assert held["file"][1:2].tolist() == [[2.0, 3.0]] and source.read == 2  # another part is read for itself
    assert held["memory"] is memory and tuple(held["file"].shape) == (4, 2)
    held = ReadOnce({"file": source})
    held.room = 31
    assert [len(held["file"][:]), len(held["file"][:]), source.read] == [4, 4, 4]  # which has no room

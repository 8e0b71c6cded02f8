"""The ranks of a tensor-parallel group as threads of one process: what is cut and summed can be judged without a group.

Every rank builds its own shard and runs the same calls; `all_reduce` waits for all and adds the parts in the order of
the ranks, so that all hold the same bits, as the real ones must. A rank that fails breaks the barrier for the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.compilers.eager import Eager
from llama_fast.parallel.tensor_parallel import OverGroup, TensorParallel
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint
from oracle.questions.cases import standard_case
from oracle.questions.judge import Bench, judge
from oracle.statistics.compare import Check, Verdict
from oracle.subjects.adapters import Rows
from oracle.subjects.fast import FastSubject

Result = TypeVar("Result")


@dataclass
class Meeting:
    """Where the ranks put their parts and find the sum."""

    size: int
    parts: list[Tensor] = field(default_factory=list)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.parts = [torch.empty(0)] * self.size
        self.barrier = threading.Barrier(self.size, timeout=60)


@dataclass(frozen=True)
class SumOverThreads(OverGroup):
    """One rank's all-reduce; what else ranks say to each other is built upon it as over a group."""

    rank: int
    meeting: Meeting

    def total(self, x: Tensor) -> Tensor:
        self.meeting.parts[self.rank] = x
        self.meeting.barrier.wait()
        total = self.meeting.parts[0]
        for part in self.meeting.parts[1:]:
            total = total + part
        self.meeting.barrier.wait()  # nobody writes the next part before all have read this one
        return total


class RankedSubject:
    """A model cut over `size` ranks, as one Subject: rank 0 answers, and every rank must answer with the same bits."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, size: int):
        self.meeting = Meeting(size)
        shards = [TensorParallel(rank, size, SumOverThreads(rank, self.meeting)) for rank in range(size)]
        plans = [replace(plan, shard=shard, compiler=Eager()) for shard in shards]
        self.runners = [build(checkpoint, each, device="cpu", dtype=dtype) for each in plans]
        self.subjects = [FastSubject(runner) for runner in self.runners]
        self.name, self.vocab_size, self.dtype = f"{size} ranks", checkpoint.config.vocab_size, dtype
        self.unlike = 0
        self.answers = 0

    def everywhere(self, ask: Callable[[FastSubject], list[Result]]) -> list[Result]:
        def on(subject: FastSubject) -> list[Result]:
            try:
                return ask(subject)
            except BaseException:
                self.meeting.barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.subjects)) as pool:
            futures = [pool.submit(on, subject) for subject in self.subjects]
            errors = [error for error in (future.exception() for future in futures) if error is not None]
            real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
            if errors:
                raise (real or errors)[0]
            answers = [future.result() for future in futures]
        self.answers += len(answers)
        self.unlike += sum(not _same(answer, answers[0]) for answer in answers)
        return answers[0]

    def prefill_logits(self, rows: Rows) -> list[Tensor]:
        return self.everywhere(lambda subject: subject.prefill_logits(rows))

    def decode_logits(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        return self.everywhere(lambda subject: subject.decode_logits(rows, splits))

    def greedy(self, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
        return self.everywhere(lambda subject: subject.greedy(prompts, n))


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def judge_ranks(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, bench: Bench, size: int = 2) -> Verdict:
    """The case's logits and tokens of a model cut over ranks, and that all ranks said the same."""
    subject = RankedSubject(checkpoint, plan, dtype, size)
    config = checkpoint.config
    verdict = judge(subject, bench, standard_case(config.vocab_size, config.max_context))
    return verdict + Verdict((Check("answers that differ between ranks", subject.unlike, 0, "", subject.answers),))

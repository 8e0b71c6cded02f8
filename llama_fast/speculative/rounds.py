"""The steps of speculation: propose, check, accept, look; one wait for the device per round.

What was written so far and where each row stands stay on the device (verification.py), and so does what a draft model proposes; a
lookup reads the tokens that come to the host. Position is an argument, so a rejected token is overwritten by the next
round, in the target's cache as in the draft's. A row that has all its tokens stands still while the others go on.

Shapes: B rows, K proposed tokens, T = K + 1, L columns of history, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.compilers.compilation import own_code
from llama_fast.contracts import KVCache
from llama_fast.engine.request import Request, Row
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import BatchSampler
from llama_fast.engine.speculation import Statistics
from llama_fast.engine.steps import Taken
from llama_fast.engine.transfer import Readback, pad, upload
from llama_fast.speculative.adaptive_k import DRAFT, PLAIN, AdaptiveK, Costs
from llama_fast.speculative.verification import State, aligned, finish, within

NO_GUESS = -1
PROMPT = -1
"""The k of what is under way while prompts are read: its one token is no plain step's."""


class Source(Protocol):
    """Where the proposals of one generation come from."""

    name: str

    def guess(self, evidence: int) -> tuple[float, float]:
        """Of proposals with this evidence, before any was judged: their acceptance, and how many proposals that counts for."""

    @property
    def blind(self) -> bool:
        """Whether proposals are only there to fill the shape, and none is to stand."""

    @property
    def keeps_up(self) -> bool:
        """Whether it can propose again after plain steps without more ado."""

    @property
    def runs_ahead(self) -> bool:
        """Whether it proposes from what is on the device alone, before the round ahead has come to the host."""

    def join(self, state: State, width: int) -> None:
        """Take in what was written so far; no row has more than `width` tokens before its newest."""

    def propose(self, state: State, k: int, behind: bool) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, k] and the distributions [B, k, V] they were drawn from; None: they are certain.

        `behind`: the round before may have accepted all of some row's proposals, so that the token before the newest is not
        yet known to the source.
        """

    def look(self, tokens: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Each row goes on with these tokens. (Evidence of its next proposals, their first) of each: evidence is at least 0,
        or -1 where there are none; the first is NO_GUESS where it is not known before proposals are asked for.
        """

    def finish(self) -> None:
        """The generation has ended, or nobody wants more of it."""


class Compilations:
    """Small functions, compiled for fixed shapes where a runner's plan compiles its own; kept by their shapes. Beside a step of
    ready-made kernels they are short as they are, and would take longer to compile than all of them.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Callable[..., Any]] = {}

    def of(self, function: Callable[..., Any], runner: Runner, *shape: object) -> Callable[..., Any]:
        """`function`, or its compiled form for calls that are alike in `shape`."""
        if not runner.plan.compiler.compiles_each_shape:
            return function
        key = (function, *shape)
        if key not in self._known:
            self._known[key] = torch.compile(own_code(function), dynamic=False, fullgraph=True)
        return self._known[key]


Mark = float | torch.cuda.Event


class Clock:
    """Marks in the device's own time: they cost no wait, and are read after the round is."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Mark, end: Mark) -> float:
        if isinstance(begin, float) or isinstance(end, float):
            assert isinstance(begin, float) and isinstance(end, float)
            return end - begin
        return begin.elapsed_time(end) / 1e3  # type: ignore[no-any-return]


def agreement(runner: Runner) -> Callable[[float], float]:
    """How the processes of a group come to one number: its sum. Alone, the number itself."""
    everyone = runner.plan.shard.everyone
    if everyone.alone:
        return lambda seconds: seconds
    return lambda seconds: float(everyone(torch.full((8,), seconds, dtype=torch.float32, device=runner.device))[0])


@dataclass(frozen=True)
class Launched:
    """A step on its way: the k it proposed, and marks before the proposals, before the check and after all."""

    k: int
    marks: tuple[Mark, Mark, Mark]


@dataclass(frozen=True)
class Ks:
    """How many tokens a round may propose."""

    choices: tuple[int, ...]
    fixed: bool
    """Whether every round proposes exactly the first of the choices."""
    aligned: bool = False
    """Whether windows are those of `aligned`: for this k must be fixed, and decoding greedy where proposals are to stand."""


def sampler_of(requests: Sequence[Request], device: torch.device) -> BatchSampler:
    """A sampler of rows with these requests' settings."""
    sampler = BatchSampler.of_free_rows(len(requests), device, 0)
    sampler.set_rows(0, [request.sampling for request in requests])
    return sampler


class Rounds:
    """Requests that start together go on by rounds of proposals and checks; a stepper of the engine."""

    def __init__(
        self,
        source: Source,
        target: Runner,
        cache: KVCache,
        ks: Ks,
        requests: Sequence[Request],
        compilations: Compilations,
    ):
        self.source, self.target, self.cache = source, target, cache
        self.ks, self.fixed, self.aligned = ks.choices, ks.fixed, ks.aligned
        self.width = 1  # tokens that a check has at least: one shape for every k
        self.rehearsal = False  # whether to compile and time every shape before the first round
        self.rows: Sequence[Row] = ()
        longest = max(request.max_new_tokens for request in requests)
        self.adaptive_k = AdaptiveK(self.ks, Costs(), longest, source.guess)
        self.statistics = Statistics(source.name)
        self.choose = sampler_of(requests, target.device)
        self.greedy = target.greedy(len(requests))  # what the target's own step chooses is not looked at
        self.compilations = compilations
        self.clock = Clock(target.device)
        self.readback = Readback(target.device)
        self.launched: deque[Launched] = deque()
        self.evidence = [0] * len(requests)
        self.guesses = [NO_GUESS] * len(requests)  # the first of the next proposals
        self.joined = self.behind = False
        self.due: int | None = None
        """The k of the step that is to be launched."""

    @property
    def left(self) -> list[int]:
        """Tokens that each row still wants; 0: it has ended."""
        return [row.left for row in self.rows]

    @property
    def next_slots(self) -> tuple[int, int]:
        return 0, self.cache.batch

    def is_due(self) -> bool:
        """Whether a step is to be launched before the oldest under way is read; of how many proposals is settled here."""
        if not any(self.left) or any(step.k == PROMPT for step in self.launched):
            return False
        k = self.next_k()
        self.due = k if self.may_launch(k) else None
        return self.due is not None

    def may_launch(self, k: int) -> bool:
        """Whether a step of k proposals may be launched now.

        It must be needed whatever those under way bring, and nothing of theirs may be needed to propose.
        """
        depth = self.readback.depth
        if k:
            depth = min(depth, 1) if self.joined and self.source.runs_ahead else 0
        under_way, left = [step.k for step in self.launched], max(self.left)
        if len(under_way) > depth or sum(of + 1 for of in under_way) >= left:
            return False
        return self.fixed or k == 0 or not under_way or self.adaptive_k.covers(k, under_way, left)

    @torch.no_grad()
    def start(self, first: int, rows: Sequence[Row], most: int | None = None) -> None:
        """Prefill: the first token of every row is on its way."""
        assert most is None, "an engine with a draft reads whole prompts"
        device, self.rows = self.target.device, rows
        requests = [row.request for row in rows]
        tokens_BT, lengths_B = pad([request.ids for request in requests], device)
        B, width = tokens_BT.shape
        news_B = upload([request.max_new_tokens for request in requests], device)
        longest = width + max(request.max_new_tokens for request in requests) + max(self.ks, default=0)
        columns = max(self.cache.length, longest) + 1
        history_BL = torch.zeros(B, columns, dtype=torch.int64, device=device)
        self.target.prepared(self.choose, columns + 1)
        history_BL[:, :width] = tokens_BT
        token_B, _ = self.target.start(tokens_BT, lengths_B, self.cache, self.choose)
        for row in rows:
            row.read = len(row.ids)
        history_BL.scatter_(1, lengths_B[:, None], token_B[:, None])
        self.state = State(history_BL, lengths_B.clone(), lengths_B + news_B - 1)
        self.look([request.ids for request in requests])
        if self.rehearsal:
            self.rehearse(self.state)
        if self.fixed and self.ks:
            self.join(self.state)
        self.readback.push(token_B[:, None])
        now = self.clock.mark()
        self.launched.append(Launched(PROMPT, (now, now, now)))

    def leave(self, slot: int) -> None:
        """A row that has ended stands still, or goes on unseen, until the last one has."""

    def drop(self, row: Row) -> None:
        """No row makes way for another: all have room for their ends from the start."""

    def finish(self) -> None:
        self.launched.clear()
        self.readback = Readback(self.target.device)
        self.source.finish()
        self.report_costs()

    def look(self, rows: Sequence[Sequence[int]]) -> None:
        found = self.source.look(rows)
        self.evidence, self.guesses = [of for of, _ in found], [guess for _, guess in found]

    def join(self, state: State) -> None:
        # a row that has ended may go on unseen up to its last position
        reach = [row.request.positions if row.ended else len(row.request.ids) + len(row.tokens) for row in self.rows]
        self.source.join(state, max(2, *reach))
        self.joined, self.behind = True, False

    def rehearse(self, state: State) -> None:
        """Run every shape on a copy: the first runs compile, the last, as most rounds are, is timed. Slots are written again.

        A plain step, and a round of a source that runs ahead, is launched right behind another, as it will be: after a wait the
        device would stand idle while the host launches, and seem slower.
        """
        ahead = self.readback.depth and self.source.runs_ahead
        for k in (PLAIN, *self.ks):
            for behind in (False, True, True, True) if ahead else (True, False, False):
                copy = state.clone()
                if k and not self.joined:
                    self.join(copy)
                if k and not ahead:
                    self.wait()
                marks = self.run(copy, k, behind)[0]
            self.wait()
            self.measure(k, marks)
            self.measure(k, marks)

    def wait(self) -> None:
        """Until the device is idle."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)

    def next_k(self) -> int:
        """The next round's k, from what is known now; 0 is a plain step. A draft that stops does not start again."""
        if self.fixed:
            return self.ks[0] if self.ks else 0
        evidence = [of for of, left in zip(self.evidence, self.left, strict=True) if left]
        k = self.adaptive_k.choose(evidence, max(self.left)) if max(evidence) >= 0 else 0
        if k == 0 and self.joined and not self.source.keeps_up and self.adaptive_k.ks:
            if max(self.left) > min(self.ks):
                self.give_up()
            self.adaptive_k.ks = ()
        return k

    def give_up(self) -> None:
        costs, a = self.adaptive_k.costs, self.adaptive_k.estimate(0).rate
        best = max(self.ks, key=lambda k: self.adaptive_k.worth(k, [0]))
        self.statistics.notice = (
            f"plain decoding after {self.statistics.rounds} rounds: at acceptance {a:.2f}, "
            f"{costs.c or 0:.2f} plain steps a proposal and {costs.v(best) or 1:.2f} a check, "
            f"no k up to {max(self.ks)} wins (k={best}: {self.adaptive_k.worth(best, [0]):.2f}x)"
        )

    @torch.no_grad()
    def launch(self) -> None:
        state, k = self.state, self.due
        assert k is not None
        if k and not self.joined:
            self.join(state)
        marks, report_BN = self.run(state, k, self.behind or bool(self.launched))
        self.readback.push(report_BN)
        self.launched.append(Launched(k, marks))

    @torch.no_grad()
    def run(self, state: State, k: int, behind: bool) -> tuple[tuple[Mark, Mark, Mark], Tensor]:
        """One round on the device. Returns its marks and the report [B, 2 + T]: taken, stood, tokens; of a plain step [B, 1]."""
        begun = self.clock.mark()
        newest_B1 = state.newest(1)
        if k == 0:
            token_B = self.target.step(newest_B1, state.position_B, self.cache, self.choose)[0]
            state.append(token_B)
            return (begun, begun, self.clock.mark()), token_B[:, None]
        draft_BK, q_BKV = self.source.propose(state, k, behind)
        proposed = self.clock.mark()
        if self.aligned:
            tokens_BT, start_B, row_B = aligned(state.history_BL, state.position_B, draft_BK)
        else:
            tokens_BT = F.pad(torch.cat([newest_B1, draft_BK], 1), (0, max(0, self.width - k - 1)))
            start_B = state.position_B
        logits_BTV = self.target.step(tokens_BT, start_B, self.cache, self.greedy)[1][:, : k + 1]
        if self.aligned:
            draft_BK, logits_BTV = within(row_B, draft_BK, logits_BTV)
        if self.source.blind:
            draft_BK, q_BKV, logits_BTV = draft_BK[:, :0].contiguous(), None, logits_BTV[:, :1].contiguous()
        finish_round = self.compilations.of(finish, self.target, *logits_BTV.shape, self.choose.code)
        report_BN = finish_round(self.choose, draft_BK, q_BKV, logits_BTV, state)
        return (begun, proposed, self.clock.mark()), report_BN

    def take(self) -> Taken:
        """Wait for the oldest step; the tokens that each row gets from it."""
        if not self.launched:
            return []
        launched, rows = self.launched.popleft(), self.readback.pop()
        if launched.k != PROMPT:
            self.measure(launched.k, launched.marks)
            rows = self.of_round(launched.k, rows) if launched.k else self.of_step(rows)
        self.look(rows)
        return [
            (row, [(int(token), None) for token in tokens])
            for row, tokens in zip(self.rows, rows, strict=True)
            if not row.ended
        ]

    def of_step(self, rows: list[list[int]]) -> list[list[int]]:
        self.statistics.plain_steps += 1
        self.adaptive_k.rest()
        if self.source.keeps_up:
            known = [of if left else -1 for of, left in zip(self.evidence, self.left, strict=True)]
            self.adaptive_k.watch(known, [[guess] == row for guess, row in zip(self.guesses, rows, strict=True)])
        return rows

    def of_round(self, k: int, rows: list[list[int]]) -> list[list[int]]:
        taken, stood = [row[0] for row in rows], [row[1] for row in rows]
        wanted = self.left
        running = [b for b, left in enumerate(wanted) if left]
        assert all(taken[b] > 0 for b in running), "a row that still wants tokens got none"
        if not self.source.blind:
            for b in running:
                seen = k - self.row(b) if self.aligned else k
                self.statistics.round(k, stood[b], emitted=min(taken[b], wanted[b]), seen=seen)
            self.adaptive_k.record(
                k, [self.evidence[b] for b in running], [stood[b] for b in running], [taken[b] for b in running]
            )
            self.behind = k in [stood[b] for b in running]
        return [row[2 : 2 + row[0]] for row in rows]

    def row(self, b: int) -> int:
        """Where the newest token of row b stands in an aligned check."""
        row = self.rows[b]
        return (len(row.request.ids) + len(row.tokens) - 1) % (self.ks[0] + 1)

    def measure(self, k: int, marks: tuple[Mark, Mark, Mark]) -> None:
        if k:
            self.adaptive_k.costs.add(DRAFT, self.clock.seconds(marks[0], marks[1]) / k)
        self.adaptive_k.costs.add(k, self.clock.seconds(marks[1], marks[2]))

    def report_costs(self) -> None:
        costs, statistics = self.adaptive_k.costs, self.statistics
        statistics.draft_cost = costs.c
        statistics.check_cost = {k: v for k in statistics.ks if costs.count(k) and (v := costs.v(k)) is not None}
        if not self.fixed and self.ks and not statistics.notice and not statistics.rounds:
            if costs.c is None or self.source.keeps_up:
                statistics.notice = "plain decoding: nothing was proposed that promised to win"
            else:
                self.give_up()

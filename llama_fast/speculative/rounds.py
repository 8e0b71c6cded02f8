"""The steps of speculation: propose, check, accept, look; one wait for the device per round.

What was written so far and where each row stands stay on the device (verification.py), and so does what a draft model proposes; a
lookup reads the tokens that come to the host. Position is an argument, so a rejected token is overwritten by the next
round, in the target's cache as in the draft's. Rows join and leave between two rounds. A row that has all its tokens stands
still while others go on; so does a slot that nobody stands in.

Shapes: B rows of a round, K proposed tokens, T = K + 1, L columns of history, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.contracts import KVCache
from llama_fast.engine.caches import part_of
from llama_fast.engine.request import Request, Row
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import BatchSampler
from llama_fast.engine.speculation import Statistics
from llama_fast.engine.steps import Taken, are_read_by, begin_reading
from llama_fast.engine.transfer import Readback, pad, upload
from llama_fast.speculative.adaptive_k import DRAFT, PLAIN, AdaptiveK, Costs
from llama_fast.speculative.clock import Clock, Marks
from llama_fast.speculative.source import NOTHING, Compilations, Source, Terms
from llama_fast.speculative.verification import State, aligned, finish, within

PROMPT = -1
"""The k of what is under way while prompts are read: its one token is no plain step's."""

Settle = Callable[[Sequence[Request], KVCache, tuple[object, ...]], Terms]
"""The terms of requests that run, in a cache of the rows of a round, with the sampler's code."""


@dataclass(frozen=True)
class Launched:
    """A step on its way: the k it proposed, its marks, and the rows whose tokens it brings, of neighbouring slots."""

    k: int
    marks: Marks
    rows: list[Row | None]


@dataclass(frozen=True)
class Manner:
    """How a proposer has its rounds run."""

    settle: Settle
    positions: int
    """The positions that a row may have, proposals included."""
    compilations: Compilations
    fixed: bool
    """Whether every round proposes the one number of tokens that the terms name."""
    aligned: bool = False
    """Whether windows are those of `aligned`: for this k must be fixed, and decoding greedy where proposals are to stand."""


class Rounds:
    """Rows go on by rounds of proposals and checks; a stepper of the engine."""

    def __init__(self, source: Source, target: Runner, slots: Sequence[Row | None], cache: KVCache, manner: Manner):
        """`slots`: the engine's own list, of the rows of the cache."""
        B, device = len(slots), target.device
        self.source, self.target, self.slots, self.all_cache, self.manner = source, target, slots, cache, manner
        self.all_state = State.of_free_rows(B, max(cache.capacity or 0, manner.positions) + 2, device)
        self.sampler = target.prepared(BatchSampler.of_free_rows(B, device, 0), self.all_state.columns)
        self.terms = Terms((), 1, Costs(), False)
        self.adaptive_k = AdaptiveK((), self.terms.costs, 1, source.guess)
        self.statistics = Statistics(source.name)
        self.clock = Clock(device)
        self.readback = Readback(device)
        self.launched: deque[Launched] = deque()
        self.known = [NOTHING] * B
        """Of each slot the evidence of its next proposals, and the first of them."""
        self.became_free: list[int] = []
        """Slots that were left since a row joined; they go on unseen up to their rows' last positions, or stand still there."""
        self.narrows = False
        """Whether a row has left since the last step."""
        self.joined = self.behind = False
        self.due: int | None = None
        """The k of the step that is to be launched."""
        self.take_part(B)

    def take_part(self, rows: int) -> None:
        """A round is of the first so many slots: of fewer than there are, while nobody stands in the others."""
        whole = rows == len(self.slots)
        self.state = self.all_state if whole else self.all_state.rows(0, rows)
        self.cache = self.all_cache if whole else self.all_cache.rows(0, rows)
        self.choose = self.sampler if whole else self.sampler.rows(0, rows)
        self.greedy = self.target.greedy(rows)  # what the target's own step chooses is not looked at

    @property
    def rows(self) -> list[Row | None]:
        """The rows of a round: None where nobody stands, or a prompt is still read."""
        slots = self.slots[: len(self.state.position_B)]
        return [None if row is None or row.reading or row.ended else row for row in slots]

    @property
    def left(self) -> list[int]:
        """Tokens that each row of a round still wants; 0: it has ended, or there is none."""
        return [0 if row is None else row.left for row in self.rows]

    @property
    def next_slots(self) -> tuple[int, int]:
        return 0, self.cache.batch

    def is_due(self) -> bool:
        """Whether a step is to be launched before the oldest under way is read; of how many proposals is settled here."""
        left = self.left
        if not any(left) or any(step.k == PROMPT for step in self.launched):
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
        return self.manner.fixed or k == 0 or not under_way or self.adaptive_k.covers(k, under_way, left)

    @torch.no_grad()
    def start(self, first: int, rows: Sequence[Row], most: int | None = None) -> None:
        B, device = len(rows), self.target.device
        opens, last = sum(row is not None for row in self.slots) == B, are_read_by(rows, most)
        state = self.all_state.rows(first, B)
        if not rows[0].read:
            prompt_BT, _ = pad([row.ids for row in rows], device)
            state.history_BL[:, : prompt_BT.shape[1]] = prompt_BT
            self.known[first : first + B] = [NOTHING] * B
            if not last:  # rounds go on beside it, and are to have room behind what it has read
                self.settle(opens)
        cache = part_of(self.all_cache, first, B)
        if last:
            self.sampler.set_rows(first, [row.request.sampling for row in rows])
        whole = len(self.slots) == B
        choose = self.target.greedy(B) if not last else self.sampler if whole else self.sampler.rows(first, B)
        answer, reach_B = begin_reading(self.target, rows, most, cache, choose)
        token_B = answer()[0]
        if not last:
            state.stand(reach_B)  # what is written behind is written again when the prompt is read on
            return
        state.begin(token_B, reach_B, upload([row.request.max_new_tokens for row in rows], device))
        self.known[first : first + B] = self.source.begin(first, [row.request for row in rows])
        self.settle(opens)
        if self.joined:
            self.source.read(state, first, max(2, *(len(row.ids) for row in rows)))
        if self.terms.is_new:
            self.rehearse(self.state)
        if self.manner.fixed and self.terms.ks and not self.joined:
            self.join(self.state)
        self.readback.push(token_B[:, None])
        now = self.clock.mark()
        self.launched.append(Launched(PROMPT, (now, now, now), list(rows)))

    def settle(self, opens: bool) -> None:
        """What holds from now on, as rows have joined: in which slots rounds are, and of how many proposals. `opens`: nobody
        was there before them.

        Where shapes are cheap, a round is of a power of two of slots, so that few rows in many slots cost what few rows cost.
        """
        free = [slot for slot in self.became_free if self.slots[slot] is None]
        if free:  # what they had room for, rounds of the new terms might not have
            self.all_state.free(upload(free, self.target.device))
        self.became_free.clear()
        needed = max(slot for slot, row in enumerate(self.slots) if row is not None) + 1
        one_shape = self.manner.aligned or self.target.plan.compiler.compiles_each_shape
        rows = len(self.slots) if one_shape else min(len(self.slots), 1 << (needed - 1).bit_length())
        self.take_part(rows)
        requests = [row.request for row in self.slots if row is not None]
        terms = self.terms = self.manner.settle(requests, self.cache, self.choose.code)
        longest = max(request.max_new_tokens for request in requests)
        if opens:
            self.adaptive_k = AdaptiveK(terms.ks, terms.costs, longest, self.source.guess)
        else:
            self.adaptive_k.renew(terms.ks, terms.costs, longest)
        self.statistics.notice = terms.notice

    def leave(self, slot: int) -> None:
        self.sampler.free_row(slot)
        self.source.leave(slot)
        self.known[slot] = NOTHING
        self.became_free.append(slot)
        self.narrows = True

    def drop(self, row: Row) -> None:
        for launched in self.launched:
            launched.rows[:] = [None if of is row else of for of in launched.rows]

    def finish(self) -> None:
        self.launched.clear()
        self.readback = Readback(self.target.device)
        self.joined = self.behind = False
        self.source.finish()
        self.report_costs()

    def join(self, state: State) -> None:
        """Let the source take in what all rows have written."""
        ahead = sum(max(0, step.k) + 1 for step in self.launched)  # of what the host has read
        rows = [row for row in self.slots[: len(state.position_B)] if row is not None]
        reach = [min(row.request.positions, len(row.request.ids) + len(row.tokens) + ahead) for row in rows]
        self.source.read(state, 0, max(2, *reach))
        self.joined, self.behind = True, False

    def narrow(self) -> None:
        """Rows have left: nobody asks how their tokens are chosen."""
        self.sampler.narrow()
        self.source.narrow()
        self.narrows = False
        self.take_part(len(self.state.position_B))

    def rehearse(self, state: State) -> None:
        """Run every shape on a copy: the first runs compile, the last, as most rounds are, is timed. Slots are written again.

        A plain step, and a round of a source that runs ahead, is launched right behind another, as it will be: after a wait the
        device would stand idle while the host launches, and seem slower.
        """
        ahead = self.readback.depth and self.source.runs_ahead
        for k in (PLAIN, *self.terms.ks):
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
        """The next round's k, from what is known now; 0 is a plain step. A draft that stops may start again when a row joins."""
        ks, left = self.terms.ks, self.left
        if self.manner.fixed:
            return ks[0] if ks else 0
        evidence = [of for (of, _), wanted in zip(self.known, left) if wanted]
        k = self.adaptive_k.choose(evidence, max(left)) if max(evidence) >= 0 else 0
        if k == 0 and self.joined and not self.source.keeps_up:
            if self.adaptive_k.ks and self.adaptive_k.knows_plain:  # else plain steps are still to be timed
                if max(left) > min(ks):
                    self.give_up()
                self.adaptive_k.ks = ()
            self.joined = False
        return k

    def give_up(self) -> None:
        costs, a, ks = self.adaptive_k.costs, self.adaptive_k.estimate(0).rate, self.terms.ks
        best = max(ks, key=lambda k: self.adaptive_k.worth(k, [0]))
        self.statistics.notice = (
            f"plain decoding after {self.statistics.rounds} rounds: at acceptance {a:.2f}, "
            f"{costs.c or 0:.2f} plain steps a proposal and {costs.v(best) or 1:.2f} a check, "
            f"no k up to {max(ks)} wins (k={best}: {self.adaptive_k.worth(best, [0]):.2f}x)"
        )

    @torch.no_grad()
    def launch(self) -> None:
        if self.narrows:
            self.narrow()
        state, k = self.state, self.due
        assert k is not None
        if k and not self.joined:
            self.join(state)
        marks, report_BN = self.run(state, k, self.behind or bool(self.launched))
        self.readback.push(report_BN)
        self.launched.append(Launched(k, marks, self.rows))

    @torch.no_grad()
    def run(self, state: State, k: int, behind: bool) -> tuple[Marks, Tensor]:
        """One round on the device. Returns its marks and the report [B, 2 + T]: taken, stood, tokens; of a plain step [B, 1]."""
        begun = self.clock.mark()
        newest_B1 = state.newest(1)
        if k == 0:
            token_B = self.target.step(newest_B1, state.position_B, self.cache, self.choose)[0]
            state.append(token_B)
            return (begun, begun, self.clock.mark()), token_B[:, None]
        draft_BK, q_BKV = self.source.propose(state, k, behind)
        proposed = self.clock.mark()
        if self.manner.aligned:
            tokens_BT, start_B, row_B = aligned(state.history_BL, state.position_B, draft_BK)
        else:
            tokens_BT = F.pad(torch.cat([newest_B1, draft_BK], 1), (0, max(0, self.terms.width - k - 1)))
            start_B = state.position_B
        logits_BTV = self.target.step(tokens_BT, start_B, self.cache, self.greedy)[1][:, : k + 1]
        if self.manner.aligned:
            draft_BK, logits_BTV = within(row_B, draft_BK, logits_BTV)
        if self.source.blind:
            draft_BK, q_BKV, logits_BTV = draft_BK[:, :0].contiguous(), None, logits_BTV[:, :1].contiguous()
        finish_round = self.manner.compilations.of(finish, self.target, *logits_BTV.shape, self.choose.code)
        report_BN = finish_round(self.choose, draft_BK, q_BKV, logits_BTV, state)
        return (begun, proposed, self.clock.mark()), report_BN

    def take(self) -> Taken:
        if not self.launched:
            return []
        launched, found = self.launched.popleft(), self.readback.pop()
        if launched.k != PROMPT:
            if len(launched.rows) == len(self.state.position_B):  # else its costs are those of other shapes
                self.measure(launched.k, launched.marks)
            found = self.of_round(launched, found) if launched.k else self.of_step(launched, found)
        taken: Taken = []
        for row, tokens in zip(launched.rows, found, strict=True):
            if row is not None and not row.ended:
                assert row.slot is not None
                self.known[row.slot] = self.source.look(row.slot, tokens)
                taken.append((row, [(int(token), None) for token in tokens]))
        return taken

    def of_step(self, launched: Launched, found: list[list[int]]) -> list[list[int]]:
        self.statistics.plain_steps += 1
        self.adaptive_k.rest()
        if self.source.keeps_up:
            running = [b for b, row in enumerate(launched.rows) if row is not None and not row.ended]
            evidence, hits = [self.known[b][0] for b in running], [[self.known[b][1]] == found[b] for b in running]
            self.adaptive_k.watch(evidence, hits)
        return found

    def of_round(self, launched: Launched, found: list[list[int]]) -> list[list[int]]:
        k, taken, stood = launched.k, [row[0] for row in found], [row[1] for row in found]
        running = [(b, row) for b, row in enumerate(launched.rows) if row is not None and not row.ended]
        assert all(taken[b] > 0 for b, _ in running), "a row that still wants tokens got none"
        if running and not self.source.blind:
            for b, row in running:
                seen = k - place(row, k) if self.manner.aligned else k
                self.statistics.round(k, stood[b], emitted=min(taken[b], row.left), seen=seen)
            numbers = [b for b, _ in running]
            evidence = [self.known[b][0] for b in numbers]
            self.adaptive_k.record(k, evidence, [stood[b] for b in numbers], [taken[b] for b in numbers])
            self.behind = k in [stood[b] for b in numbers]
        return [row[2 : 2 + row[0]] for row in found]

    def measure(self, k: int, marks: Marks) -> None:
        if k:
            self.adaptive_k.costs.add(DRAFT, self.clock.seconds(marks[0], marks[1]) / k)
        self.adaptive_k.costs.add(k, self.clock.seconds(marks[1], marks[2]))

    def report_costs(self) -> None:
        costs, statistics = self.adaptive_k.costs, self.statistics
        statistics.draft_cost = costs.c
        statistics.check_cost = {k: v for k in statistics.ks if costs.count(k) and (v := costs.v(k)) is not None}
        if not self.manner.fixed and self.terms.ks and not statistics.notice and not statistics.rounds:
            if costs.c is None or self.source.keeps_up:
                statistics.notice = "plain decoding: nothing was proposed that promised to win"
            else:
                self.give_up()


def place(row: Row, k: int) -> int:
    """Where a row's newest token stands in an aligned check of k proposals."""
    return (len(row.request.ids) + len(row.tokens) - 1) % (k + 1)

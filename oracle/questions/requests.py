"""Requests of unusual shapes, on a model's first block: many rows, kept prefixes, penalties, log-probabilities, windows' edges.

What is asked here depends on how rows, positions and settings are handled, and that is the same in every block; one block
makes it affordable for every model. All in float32 and not compiled, so that tokens can be compared exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from llama_fast.build import build, rebuild
from llama_fast.contracts import KVCache
from llama_fast.engine.engine import Engine
from llama_fast.engine.generate import generate, stream
from llama_fast.engine.logprobs import TokenLogprob
from llama_fast.engine.request import Event, requests_of
from llama_fast.engine.room import is_paged
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import BatchSampler, Sampling
from llama_fast.engine.transfer import pad
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint
from oracle.questions.cases import random_row
from oracle.questions.checkpoints import end_blocks, few_words, one_block, references
from oracle.questions.judge import Bench
from oracle.questions.pages import LONGEST_PAGED, PAGE, pages_check, with_short_pages
from oracle.questions.survival import survived
from oracle.statistics.compare import Check, Verdict, empty
from oracle.subjects.adapters import Rows
from oracle.subjects.fast import FastSubject, Recorder

LENGTHS = (4, 9, 6, 12, 5, 10, 7)  # the shortest first, so that others are ahead of it
SPLITS = (2, 5, 3, 7, 1, 6, 4)
BATCHES = {  # by name: each row's length, and the tokens of it that are prefilled
    "seven rows": (LENGTHS, SPLITS),
    "four rows of one length": ((6,) * 4, (3,) * 4),
    "eight rows": ((6, 3, 5, 4, 6, 2, 5, 3), (2, 1, 4, 1, 3, 1, 2, 2)),
    "nine rows of one length": ((4,) * 9, (2,) * 9),
    "seventeen rows": ((2, 3, 4) * 5 + (3, 2), (1, 2, 1) * 5 + (1, 1)),
}
"""4, 8 and 16 are where kernels and products change their ways: asked are these numbers of rows, or one more."""
LONGER = (300, 230)
HELD, NEW = 3, 6
TOP = 2  # likeliest tokens told beside each
PENALTY = 1.7
LOGPROB_ERROR = 1e-4
"""Between a log-softmax in float32 and one in float64 of the same logits, for logits up to a few hundred."""
LONGEST_EDGE = 2048


def judge_requests(
    checkpoint: Checkpoint, plan: Plan, device: torch.device, dtype: torch.dtype = torch.float32
) -> Verdict:
    """Every question of this file; in other types than float32 those whose tokens need not be compared exactly."""
    one = one_block(checkpoint, device)
    if one.config.max_context < max(LENGTHS):
        return empty("requests", f"a context of {one.config.max_context} has no room for {max(LENGTHS)} tokens")
    runner = build(one, plan, device=device, dtype=dtype)
    bench, subject = Bench(*references(runner, one)), FastSubject(runner)
    verdict, V = Verdict(), subject.vocab_size
    batches = {
        name: [random_row(V, length, seed=70 + length + 13 * b) for b, length in enumerate(lengths)]
        for name, (lengths, _) in BATCHES.items()
    }
    bench.of([row for rows in batches.values() for row in rows])  # in one pass
    for name, (lengths, splits) in BATCHES.items():
        verdict += bench.decode(subject, batches[name], list(splits), list(lengths)).named(name)
    rows = batches["seven rows"]
    pairs = FastSubject(runner, tokens_a_step=2)
    verdict += bench.route(pairs.several, rows, list(SPLITS), list(LENGTHS)).named("two tokens a step")
    verdict += bench.route(Served(runner), rows[:2], list(SPLITS[:2]), list(LENGTHS[:2])).named("a cache that decoded")
    verdict += _longer(checkpoint, plan, device, dtype)
    verdict += bench.route(Extended(runner), rows, list(LENGTHS), list(LENGTHS)).named("a kept prefix")
    room = one.config.max_context - max(LENGTHS)
    if room >= NEW and dtype is torch.float32:
        checks = (_held(runner, rows), penalised_check(subject, rows), told_check(*told_logprobs(runner, rows)))
        verdict += Verdict(checks)
        if one.config.max_context >= LONGEST_PAGED:
            verdict += survived("pages", lambda: Verdict(tuple(_pages(checkpoint, plan, device))))
    edge = one.config.window
    if edge is not None and edge + 1 <= min(one.config.max_context, LONGEST_EDGE):
        long = [random_row(V, edge + extra, seed=90) for extra in (-1, 0, 1)]
        verdict += bench.decode(subject, long, [len(row) for row in long], [len(row) for row in long]).named(
            "a prompt as long as the window"
        )
    return verdict


def _pages(checkpoint: Checkpoint, plan: Plan, device: torch.device) -> list[Check]:
    """Of the first block and the last: keys of the first alone know nothing of the tokens before theirs."""
    return pages_check(build(few_words(end_blocks(checkpoint), device), plan, device=device, dtype=torch.float32))


def _longer(checkpoint: Checkpoint, plan: Plan, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Rows of some hundred positions through the first block and the last one: slots that only a later block has wrong show."""
    two = few_words(end_blocks(checkpoint), device)
    lengths = [min(length, two.config.max_context) for length in LONGER]
    runner = build(two, plan, device=device, dtype=dtype)
    rows = [random_row(two.config.vocab_size, length, seed=50 + i) for i, length in enumerate(lengths)]
    starts = [max(1, length - 9 - 70 * i) for i, length in enumerate(lengths)]
    subject = FastSubject(runner, used_cache=True)
    truth, yardstick = references(runner, two)
    bench = Bench(truth, yardstick.at_far_positions())
    return bench.decode(subject, rows, starts, lengths).named("longer rows, first and last block")


class Served:
    """Each row alone in a cache in which a longer one was decoded before, not only prefilled."""

    def __init__(self, runner: Runner):
        self.runner = runner

    def __call__(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        found = []
        subject, longest = FastSubject(self.runner), max(map(len, rows))
        for row, split in zip(rows, splits, strict=True):
            before = random_row(subject.vocab_size, min(longest + 4, self.runner.config.max_context), seed=60 + split)
            cache = self.runner.allocate(1, len(before))
            for tokens, at in ((before, 1), (row, split)):
                seen = [self.runner.prefill(*pad([tokens[:at]], self.runner.device), cache).clone()]
                for place in range(at, len(tokens)):
                    token_11 = torch.tensor([[tokens[place]]], device=self.runner.device)
                    start_1 = torch.tensor([place], device=self.runner.device)
                    seen.append(self.runner.decode(token_11, start_1, cache)[:, -1].clone())
            found.append(torch.cat(seen))
        return found


class Extended:
    """The logits at each row's end, after a prefill of `HELD` tokens and one of the rest."""

    def __init__(self, runner: Runner):
        self.runner = runner

    def __call__(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        runner, cache = self.runner, held_cache(self.runner, rows, max(map(len, rows)))
        tokens_BT, lengths_B = pad([row[HELD:] for row in rows], runner.device)
        start_B = torch.full_like(lengths_B, HELD)
        greedy = BatchSampler(Sampling(), [0] * len(rows), runner.device)
        logits_BV = runner.extend(tokens_BT, start_B, lengths_B, cache, greedy)[1]
        return [logits_V[None] for logits_V in logits_BV]


def held_cache(runner: Runner, rows: Rows, length: int) -> KVCache:
    """A cache that holds the first `HELD` tokens of every row."""
    cache = runner.allocate(len(rows), length)
    tokens_BT, lengths_B = pad([row[:HELD] for row in rows], runner.device)
    runner.prefill(tokens_BT, lengths_B, cache)
    return cache


def _held(runner: Runner, rows: Rows) -> Check:
    """Continuations behind a kept prefix are those of the whole prompt, greedy and drawn. Counted are rows that go on otherwise
    behind the next row's prefix: no other row would show that a prefix is not its own."""
    name, unlike, where, count = "rows that continue otherwise behind a kept prefix", 0, "", 0
    runner = rebuild(runner, with_short_pages(runner.plan))
    held = HELD // PAGE * PAGE if is_paged(runner.allocate(1, HELD)) else HELD
    others = [[*other[:HELD], *row[HELD:]] for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]
    for how, sampling in (("greedy", Sampling()), ("drawn", Sampling(1.0, seed=3))):
        engine = Engine(runner, len(rows), max(map(len, rows)) + NEW, keeps_prefixes=True)
        answered([engine.add(request) for request in requests_of([row[:HELD] for row in rows], 1)], engine)
        reused = engine.reused_tokens
        said = answered([engine.add(request) for request in requests_of(rows, NEW, sampling)], engine)
        if engine.reused_tokens - reused != held * len(rows):
            return Check(name, 1, 0, f"{how}: nothing was kept", 1)
        whole, behind = (generate(runner, each, NEW, sampling).completions for each in (rows, others))
        count += sum(a.tokens != b.tokens for a, b in zip(whole, behind, strict=True))
        for b, (events, completion) in enumerate(zip(said, whole, strict=True)):
            if [event.token for event in events] != completion.tokens:
                unlike += 1
                where = where or f"{how}, row {b}"
    return Check(name, unlike, 0, where if count or unlike else "no row tells another's prefix", count or unlike)


def answered(ids: Sequence[int], engine: Engine) -> list[list[Event]]:
    """What an engine says to requests of these numbers, until all have ended."""
    said: dict[int, list[Event]] = {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            said[event.id].append(event)
    return list(said.values())


def penalised_check(subject: FastSubject, rows: Rows) -> Check:
    """Each token is the argmax of logits penalised by the published rule, on what its row holds by then: in the loop, and of
    given logits of either sign."""
    asked: list[tuple[list[int], Tensor, int]] = []  # what is held, logits [V], what was chosen
    for row, (tokens, logits_nV) in zip(rows, subject.penalised(rows, NEW, PENALTY), strict=True):
        asked += [([*row, *tokens[:i]], logits_nV[i], token) for i, token in enumerate(tokens)]
    # A held token, and another close to what is left of it, on either side: whoever divides by another number errs.
    device, size = subject.runner.device, 12
    for held_logit in (6.0, 0.5, -0.5, -2.0):
        left = held_logit / PENALTY if held_logit > 0 else held_logit * PENALTY
        logits_BV = torch.full((2, size), -50.0, device=device)
        logits_BV[:, 3], logits_BV[0, 7], logits_BV[1, 7] = held_logit, left - 0.02, left + 0.02
        choose = BatchSampler(Sampling(repetition_penalty=PENALTY), [0, 0], device, [[3], [3, 1]], size)
        chosen = choose(logits_BV.clone(), torch.zeros(2, dtype=torch.int64, device=device)).tolist()
        asked += list(zip([[3], [3, 1]], logits_BV, chosen, strict=True))
    wrong, where = 0, ""
    for held_ids, logits_V, token in asked:
        seen = torch.tensor(sorted(set(held_ids)), device=device)
        penalised_V = logits_V.double()
        values = penalised_V[seen]
        penalised_V[seen] = torch.where(values > 0, values / PENALTY, values * PENALTY)
        behind, allowed = float(penalised_V.max() - penalised_V[token]), 1e-5 * float(penalised_V.abs().max())
        if not behind <= allowed:  # so that NaN is wrong too
            wrong += 1
            where = where or f"token {token} behind {held_ids[-3:]}"
    return Check("penalised tokens that another beats", wrong, 0, where, len(asked))


def told_logprobs(runner: Runner, rows: Rows) -> tuple[list[list[int | None]], list[Tensor], list[list[TokenLogprob]]]:
    """Drawn tokens by column, the logits [B, V] that each column came from, and what each row was told beside them."""
    recorder = Recorder(runner, len(rows))
    requests = requests_of(rows, NEW, Sampling(1.0, seed=9), logprobs=TOP)
    events = list(stream(cast(Runner, recorder), requests))
    told = [[event.logprob for event in row if event is not None and event.logprob is not None] for row in zip(*events)]
    return [[None if event is None else event.token for event in column] for column in events], recorder.columns(), told


def told_check(
    columns: Sequence[Sequence[int | None]], logits: Sequence[Tensor], told: Sequence[Sequence[TokenLogprob]]
) -> Check:
    """Log-probabilities told beside tokens, against those of the logits that the tokens came from.

    NaN errs without bound, and so does what was not told.
    """
    name, asked = "largest error of a log-probability", NEW * len(told)
    worst, where, compared = 0.0, "", 0
    for i, (column, logits_BV) in enumerate(zip(columns, logits)):
        for b, (token, logprobs_V) in enumerate(zip(column, logits_BV.double().log_softmax(-1))):
            if i < len(told[b]):
                error = _told_error(told[b][i], token, logprobs_V)
                compared += 1
                if error > worst:
                    worst, where = error, f"row {b}, token {i}"
    if compared != asked:
        return Check(name, math.inf, LOGPROB_ERROR, f"{compared} tokens, asked {asked}", asked)
    return Check(name, worst, LOGPROB_ERROR, where, compared)


def _told_error(said: TokenLogprob, token: int | None, logprobs_V: Tensor) -> float:
    """The largest error of one token's log-probability and of the likeliest's beside it; infinite for NaN, or another token."""
    if said.token != token or len(said.top) != TOP:
        return math.inf
    likeliest = zip(sorted(said.top.values(), reverse=True), logprobs_V.topk(TOP).values.tolist(), strict=True)
    errors = [abs(said.logprob - float(logprobs_V[token])), *(abs(ours - true) for ours, true in likeliest)]
    return max(math.inf if math.isnan(error) else error for error in errors)

"""Requests of unusual shapes, on a model's first block: many rows, kept prefixes, penalties, log-probabilities, windows' edges.

What is asked here depends on how rows, positions and settings are handled, and that is the same in every block; one block
makes it affordable for every model. All in float32 and not compiled, so that tokens can be compared exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from llama_fast.build import Runner, build
from llama_fast.generate import generate, pad, stream
from llama_fast.logprobs import Logprobs
from llama_fast.plan import KVCache, Plan
from llama_fast.sampling import Chooser, Sampling
from llama_ref.checkpoint import Checkpoint
from oracle.adapters import Rows
from oracle.cases import random_row
from oracle.compare import Check, Verdict, empty
from oracle.fast import FastSubject, Recorder
from oracle.judge import Bench
from oracle.questions import first_blocks, references

LENGTHS = (4, 9, 6, 12, 5, 10, 7)  # the shortest first, so that others are ahead of it
SPLITS = (2, 5, 3, 7, 1, 6, 4)
HELD, NEW = 3, 6
PENALTY = 1.7
LOGPROB_ERROR = 1e-4
"""Between a log-softmax in float32 and one in float64 of the same logits, for logits up to a few hundred."""
LONGEST_EDGE = 2048


def judge_requests(checkpoint: Checkpoint, plan: Plan, device: torch.device) -> Verdict:
    """Every question of this file."""
    one = first_blocks(checkpoint, 1)
    if one.config.max_context < max(LENGTHS):
        return empty("requests", f"a context of {one.config.max_context} has no room for {max(LENGTHS)} tokens")
    runner = build(one, plan, device=device, dtype=torch.float32)
    bench, subject = Bench(*references(runner, one)), FastSubject(runner)
    rows = [random_row(subject.vocab_size, length, seed=70 + length) for length in LENGTHS]
    room = one.config.max_context - max(LENGTHS)
    verdict = bench.decode(subject, rows, list(SPLITS), list(LENGTHS)).named("seven rows")
    verdict += bench.route(Extended(runner), rows, list(LENGTHS), list(LENGTHS)).named("a kept prefix")
    if room >= NEW:
        checks = (_held(runner, rows), _penalised(subject, rows), _told(runner, rows))
        verdict += Verdict(checks)
    edge = one.config.window
    if edge is not None and edge + 1 <= min(one.config.max_context, LONGEST_EDGE):
        long = [random_row(subject.vocab_size, edge + extra, seed=90) for extra in (-1, 0, 1)]
        verdict += bench.decode(subject, long, [len(row) for row in long], [len(row) for row in long]).named(
            "a prompt as long as the window"
        )
    return verdict


class Extended:
    """The logits at each row's end, after a prefill of `HELD` tokens and one of the rest."""

    def __init__(self, runner: Runner):
        self.runner = runner

    def __call__(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        runner, cache = self.runner, held_cache(self.runner, rows, max(map(len, rows)))
        tokens_BT, lengths_B = pad([row[HELD:] for row in rows], runner.device)
        start_B = torch.full_like(lengths_B, HELD)
        greedy = Chooser(Sampling(), [0] * len(rows), runner.device)
        logits_BV = runner.extend(tokens_BT, start_B, lengths_B, cache, greedy)[1]
        return [logits_V[None] for logits_V in logits_BV]


def held_cache(runner: Runner, rows: Rows, length: int) -> KVCache:
    """A cache that holds the first `HELD` tokens of every row."""
    cache = runner.allocate(len(rows), length)
    tokens_BT, lengths_B = pad([row[:HELD] for row in rows], runner.device)
    runner.prefill(tokens_BT, lengths_B, cache)
    return cache


def _held(runner: Runner, rows: Rows) -> Check:
    """Continuations behind a kept prefix are those of the whole prompt, greedy and drawn."""
    unlike, where = 0, ""
    for name, sampling in (("greedy", Sampling()), ("drawn", Sampling(1.0, seed=3))):
        cache = held_cache(runner, rows, max(map(len, rows)) + NEW)
        columns = list(stream(runner, rows, NEW, sampling, cache=cache, held=HELD))
        whole = generate(runner, rows, NEW, sampling).completions
        for b, completion in enumerate(whole):
            if [column[b] for column in columns] != completion.tokens:
                unlike += 1
                where = where or f"{name}, row {b}"
    return Check("rows that continue otherwise behind a kept prefix", unlike, 0, where, 2 * len(rows))


def _penalised(subject: FastSubject, rows: Rows) -> Check:
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
        choose = Chooser(Sampling(repetition_penalty=PENALTY), [0, 0], device, [[3], [3, 1]], size)
        chosen = choose(logits_BV.clone(), torch.zeros(2, dtype=torch.int64, device=device)).tolist()
        asked += list(zip([[3], [3, 1]], logits_BV, chosen, strict=True))
    wrong, where = 0, ""
    for held_ids, logits_V, token in asked:
        seen = torch.tensor(sorted(set(held_ids)), device=device)
        penalised_V = logits_V.double()
        values = penalised_V[seen]
        penalised_V[seen] = torch.where(values > 0, values / PENALTY, values * PENALTY)
        if float(penalised_V.max() - penalised_V[token]) > 1e-5 * float(penalised_V.abs().max()):
            wrong += 1
            where = where or f"token {token} behind {held_ids[-3:]}"
    return Check("penalised tokens that another beats", wrong, 0, where, len(asked))


def _told(runner: Runner, rows: Rows) -> Check:
    """Log-probabilities told beside tokens, against those of the logits that the tokens came from."""
    recorder, told = Recorder(runner), Logprobs(len(rows), top=2)
    columns = list(stream(cast(Runner, recorder), rows, NEW, Sampling(1.0, seed=9), logprobs=told))
    worst, where = 0.0, ""
    for i, (column, logits_BV) in enumerate(zip(columns, recorder.logits)):
        for b, (token, logprobs_V) in enumerate(zip(column, logits_BV.double().log_softmax(-1), strict=True)):
            assert token is not None
            said, likeliest = told.rows[b][i], logprobs_V.topk(2).values
            errors = [abs(said.logprob - float(logprobs_V[token])), float(said.token != token)]
            errors += [abs(a - float(v)) for a, v in zip(sorted(said.top.values(), reverse=True), likeliest)]
            if max(errors) > worst:
                worst, where = max(errors), f"row {b}, token {i}"
    return Check("largest error of a log-probability", worst, LOGPROB_ERROR, where, NEW * len(rows))

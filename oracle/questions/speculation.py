"""Judge speculative decoding: its greedy tokens are the target's own, its logits those of plain decoding, up to rounding.

The subject is the target with a proposer before it. What the target said at a position is taken from the last check that
covered it: an earlier one may have stood on tokens that were rejected. So tokens and logits are judged together, by the
same rules as plain decoding: each token the argmax of the logits shown, each disagreement with truth a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama_fast.engine.runner import Runner
from llama_fast.engine.speculation import Speculation
from llama_fast.speculative.acceptance import accept, accept_greedy
from llama_ref.checkpoint import Checkpoint
from llama_ref.config import LlamaConfig
from oracle.questions.cases import random_row
from oracle.questions.checkpoints import references
from oracle.questions.generation import judge_stopping
from oracle.questions.judge import Bench
from oracle.statistics.compare import Check, Outcome, Verdict, empty
from oracle.statistics.rejection import Accept, Tables, worst_error
from oracle.subjects.speculative import SpeculativeSubject

NEW_TOKENS = 64
STOP_AMONG = 12  # new tokens where many runs are needed
AcceptGreedy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def judge_speculation(
    runner: Runner,
    checkpoint: Checkpoint,
    draft: Speculation,
    prompts: Sequence[Sequence[int]] = (),
    new_tokens: int = NEW_TOKENS,
    batch: int | None = None,
    cache_length: int | None = None,
) -> Verdict:
    """Greedy continuations of `prompts` (by default two random ones of unequal length) with `draft`, and their ends."""
    config = checkpoint.config
    rows = prompts_or_random(prompts, config)
    longest = max(map(len, rows))
    room = min(cache_length or config.max_context, config.max_context)
    new_tokens = min(new_tokens, room - longest - draft.slack)
    if new_tokens < 1:
        return empty("room", f"a cache of {room} leaves none after {longest} tokens and {draft.slack} proposals")
    truth, yardstick = references(runner, checkpoint)
    subject = SpeculativeSubject(runner, draft, batch, cache_length)
    verdict = Bench(truth, yardstick).greedy(subject, rows, new_tokens)
    told = [done.speculation for done in subject.generations if done.speculation is not None]
    if verdict.outcome is Outcome.AGREE and not any(one.proposed or one.notice for one in told):
        return empty("proposals", "no token was proposed: what was asked is plain decoding")
    return verdict + judge_stopping(subject, rows, min(STOP_AMONG, new_tokens), quick=True)


def prompts_or_random(prompts: Sequence[Sequence[int]], config: LlamaConfig) -> list[list[int]]:
    """Where there is no text, two rows of unequal length."""
    return [list(prompt) for prompt in prompts] or [list(random_row(config.vocab_size, n, n)) for n in (6, 11)]


def check_draft(draft: LlamaConfig, target: LlamaConfig, k: int, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError, with the numbers, for a draft model that `judge_speculation` could not ask."""
    if draft.vocab_size != target.vocab_size:
        raise ValueError(
            f"the draft has a vocabulary of {draft.vocab_size} tokens, the target one of {target.vocab_size}"
        )
    longest = max(map(len, prompts_or_random(prompts, target)))
    wanted = min(longest + NEW_TOKENS + k, target.max_context)
    if wanted > draft.max_context:
        raise ValueError(f"the draft's context of {draft.max_context} is shorter than the {wanted} positions asked for")


def judge_acceptance(sampled: Accept | None = None, greedy: AcceptGreedy | None = None) -> Verdict:
    """The law of what is emitted, enumerated, on tables where proposals are good, bad, certain, and impossible.

    At temperature 0: the proposals up to the first that is not the target's best, and then that best, for every pattern.
    """
    sampled, greedy = sampled or accept, greedy or accept_greedy
    worst, where, asked = 0.0, "", 0
    for name, tables in law_tables().items():
        error = worst_error(sampled, tables)
        asked += 1
        if not error <= worst:
            worst, where = error, name
    wrong = []
    for K in (1, 3):
        patterns = torch.cartesian_prod(*[torch.tensor([0, 1])] * K).view(-1, K)
        best_RT = torch.arange(K + 1) + 10 * torch.arange(1, len(patterns) + 1)[:, None]
        draft_RK = torch.where(patterns == 1, best_RT[:, :K], 5)
        tokens_RT, count_R = greedy(draft_RK, best_RT)
        for row, pattern in enumerate(patterns.tolist()):
            count = (pattern + [0]).index(0) + 1
            if int(count_R[row]) != count or tokens_RT[row, :count].tolist() != best_RT[row, :count].tolist():
                wrong.append(f"k {K}, {pattern}: {tokens_RT[row].tolist()}, {int(count_R[row])} of them")
    return Verdict(
        (
            Check("error of the emitted law", worst, LAW_ERROR, where, asked),
            Check("greedy rounds that emit something else", len(wrong), 0, wrong[0] if wrong else "", 10),
        )
    )


LAW_ERROR = 1e-12
"""Thresholds are found to 2^-53, and a probability is the sum of less than a hundred products of them."""


def law_tables() -> dict[str, Tables]:
    """Conditional laws of three tokens by name: one and two proposals, alike and unlike, with zeros and certainties."""

    def laws(K: int, seed: int, sharp: float) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = [[3] * (i + 1) for i in range(K)]
        return [(sharp * torch.randn(s, generator=generator, dtype=torch.float64)).softmax(-1) for s in shapes]

    certain, holes = torch.tensor([0.0, 1.0, 0.0]).double(), torch.tensor([0.5, 0.0, 0.5]).double()
    return {
        "one proposal": Tables(laws(2, 1, 1.0), laws(1, 2, 1.0)),
        "two proposals": Tables(laws(3, 3, 1.5), laws(2, 4, 1.5)),
        "the target itself": Tables(laws(3, 5, 1.0), laws(2, 5, 1.0)),
        "certain proposals": Tables(laws(3, 6, 1.0), [certain, certain.expand(3, 3).contiguous()]),
        "impossible tokens": Tables([holes, *laws(3, 7, 2.0)[1:]], laws(2, 8, 0.5)),
    }

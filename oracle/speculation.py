"""Judge speculative decoding: its greedy tokens are the target's own, its logits those of plain decoding, up to rounding.

The subject is the target with a proposer before it. What the target said at a position is taken from the last check that
covered it: an earlier one may have stood on tokens that were rejected. So tokens and logits are judged together, by the
same rules as plain decoding: each token the argmax of the logits shown, each disagreement with truth a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from llama_fast.acceptance import accept, accept_greedy
from llama_fast.build import Runner, build
from llama_fast.generate import Generation, generate
from llama_fast.plan import Plan
from llama_fast.speculation import Speculation
from llama_ref.checkpoint import Checkpoint
from llama_ref.config import LlamaConfig
from oracle.adapters import Rows
from oracle.cases import random_row
from oracle.certificate import Certificate
from oracle.compare import Check, Verdict, empty
from oracle.fast import FastSubject
from oracle.generation import judge_stopping
from oracle.judge import Bench
from oracle.questions import references
from oracle.rejection import Accept, Tables, worst_error

NEW_TOKENS = 64
STOP_AMONG = 12  # new tokens where many runs are needed
AcceptGreedy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Watched:
    """A runner that keeps what it said: `said[b][p]` are the logits [V] at position p of row b, the latest."""

    def __init__(self, runner: Runner, batch: int):
        self._runner = runner
        self.said: list[dict[int, Tensor]] = [{} for _ in range(batch)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def start(self, tokens_BT: Tensor, lengths_B: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        token_B, logits_BV = self._runner.start(tokens_BT, lengths_B, *arguments)
        for row, length, logits_V in zip(self.said, lengths_B.tolist(), logits_BV.clone(), strict=True):
            row[length - 1] = logits_V
        return token_B, logits_BV

    def step(self, tokens_BT: Tensor, start_B: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        at = start_B.tolist()
        token_B, logits_BTV = self._runner.step(tokens_BT, start_B, *arguments)
        for row, start, logits_TV in zip(self.said, at, logits_BTV.clone(), strict=True):
            row.update({start + t: logits_V for t, logits_V in enumerate(logits_TV)})
        return token_B, logits_BTV


class SpeculativeSubject(FastSubject):
    """A runner that decodes greedily with proposals; prefill and teacher-forced decoding are the plain runner's."""

    def __init__(self, runner: Runner, draft: Speculation, batch: int | None = None, cache_length: int | None = None):
        super().__init__(runner, batch, cache_length)
        self.draft = draft
        self.generations: list[Generation] = []

    def greedy(self, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
        found: list[tuple[list[int], Tensor]] = []
        for group, real in self._groups(prompts):
            watched = Watched(self.runner, len(group))
            done = self._generation(cast(Runner, watched), group, n)
            self.generations.append(done)
            for row, completion, said in list(zip(group, done.completions, watched.said, strict=True))[:real]:
                tokens = completion.tokens
                unsaid_V = torch.full_like(said[len(row) - 1], torch.nan)  # a token that no logits were computed for
                found.append((tokens, torch.stack([said.get(len(row) - 1 + i, unsaid_V) for i in range(len(tokens))])))
        return found

    def until(self, prompts: Rows, n: int, eos_ids: Collection[int]) -> list[tuple[list[int], str]]:
        found: list[tuple[list[int], str]] = []
        for group, real in self._groups(prompts):
            done = self._generation(self.runner, group, n, eos_ids)
            found += [(completion.tokens, completion.finish_reason) for completion in done.completions[:real]]
        return found

    def _generation(self, runner: Runner, group: Rows, n: int, eos_ids: Collection[int] = ()) -> Generation:
        """n tokens with proposals, in a cache with room for them."""
        needed = max(2, *(len(row) for row in group)) + n + self.draft.slack
        cache = self._cache(len(group), min(needed, runner.config.max_context))
        return generate(runner, group, n, eos_ids=eos_ids, cache=cache, draft=self.draft)


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
    return verdict + judge_stopping(subject, rows, min(STOP_AMONG, new_tokens))


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


def verify_speculation(
    certificate: Certificate,
    checkpoint: Checkpoint,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    proposers: Callable[[torch.dtype], Sequence[Speculation]],
    prompts: Sequence[Sequence[int]] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Add to a certificate: the law of `accept` by enumeration, that of whole rounds by sampling, and greedy streams with every
    proposer, in both types."""
    from oracle.law import judge_rounds  # which builds on this file

    certificate.parts["acceptance law"] = judge_acceptance()
    progress("the law of whole rounds")
    certificate.parts["law of rounds"] = judge_rounds(device)
    for of_type in dict.fromkeys((torch.float32, dtype)):
        name = str(of_type).removeprefix("torch.")
        progress(f"{name}: speculation")
        runner = build(checkpoint, plan, device, of_type)
        for draft in proposers(of_type):
            verdict = judge_speculation(runner, checkpoint, draft, prompts)
            kind = type(draft).__name__.lower()
            certificate.parts[f"{name} {kind}"] = verdict


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

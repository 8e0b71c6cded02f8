"""Whole rounds of speculation at a temperature, judged by the joint law of the tokens that come of them.

With a vocabulary of four the law of the next four tokens has 256 probabilities, which truth gives exactly. Rows with seeds of
their own are counted against it by chi-square, one false alarm in a million. A law that differs by total variation t adds
4 n t^2 to the statistic (Cauchy-Schwarz), so that 24,576 rows show a shift of 6%. The models are tiny and random: what is
judged is the arithmetic of rounds, which does not depend on the model.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.encodings.dense import Dense
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner
from llama_fast.plan import Plan
from llama_fast.speculative.proposers import Draft, Ngram, Padded, Proposer
from llama_fast.speculative.rounds import Rounds
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.questions.checkpoints import references
from oracle.questions.face import PROMPTS, ids_of
from oracle.questions.generation import chi_square, distribution, judge_stopping, shows
from oracle.questions.survival import survived
from oracle.statistics.compare import Check, Verdict, empty
from oracle.subjects.fast import sampling_of
from oracle.subjects.speculative import SpeculativeSubject
from oracle.subjects.subject import Setting
from oracle.subjects.walkers import walker

V, NEW = 4, 4
ROWS, BATCHES = 8192, 3
LEAST = 10.0  # expected in a cell: rarer sequences are counted together
SHIFT = 0.06
"""The total variation that the rows must show."""
PROMPT = (1, 3, 0, 2, 1, 3)
PLAN = Plan(Dense(), cache=Static(multiple=16))
RAGGED = ((1, 2, 1, 2, 1), (3,), (0, 0, 1, 0, 0, 1), (2, 3, 1))
CONFIG = LlamaConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=24, vocab_size=V, max_context=64)


class Changing(Ngram):
    """A lookup whose rounds take turns with plain steps, whatever would pay."""

    def begin(self, *arguments: Any, **options: Any) -> Rounds:
        rounds = super().begin(*arguments, **options)
        turns = deque((0, 1, 0, 2))
        launch = rounds.launch

        def next_k() -> int:
            return turns[0] if turns[0] < max(rounds.left) else 0

        def launched() -> None:  # and not whenever a step is thought of
            launch()
            turns.rotate(-1)

        rounds.next_k, rounds.launch = next_k, launched  # type: ignore[method-assign]
        return rounds


def judge_rounds(device: torch.device) -> Verdict:
    """The sampled law of every kind of proposer, and aligned rounds against plain decoding through their checks."""
    target, other = tiny(CONFIG, 1, device), tiny(replace(CONFIG, n_layers=1), 5, device)
    ways: dict[str, tuple[Proposer, Setting]] = {
        "another model, k 2": (Draft(other, 2), Setting(1.5)),
        "the model itself, k 3": (Draft(target, 3), Setting(0.8, top_k=3)),
        "a lookup, k 2": (Ngram(2, shortest=1), Setting(1.5, top_p=0.9)),
        "a lookup and plain steps": (Changing(shortest=1), Setting(1.2)),
    }
    questions: dict[str, Callable[[], Verdict]] = {
        name: functools.partial(law_of, name, target, proposer, setting) for name, (proposer, setting) in ways.items()
    }
    walks = build(walker(), replace(PLAN, cache=Static()), device, torch.float32)
    stopping = SpeculativeSubject(walks, Draft(walks, 3))  # which ends within rounds that stand whole
    questions["ends"] = functools.partial(judge_stopping, stopping, [ids_of(prompt) for prompt in PROMPTS], 12)
    questions["aligned rounds"] = functools.partial(aligned_as_padded, target)
    return sum((survived(name, ask) for name, ask in questions.items()), Verdict())


def aligned_as_padded(target: Runner) -> Verdict:
    """Aligned rounds against plain decoding through checks of their shape: the same tokens and logits, bit for bit."""
    proposers = (Ngram(3, aligned=True, shortest=1), Padded(3))
    aligned, padded = (SpeculativeSubject(target, proposer).greedy(RAGGED, 24) for proposer in proposers)
    unlike = sum(a[0] != b[0] or not torch.equal(a[1], b[1]) for a, b in zip(aligned, padded, strict=True))
    return Verdict((Check("aligned rows that are not those of padded checks", unlike, 0, "", len(RAGGED)),))


def tiny(config: LlamaConfig, seed: int, device: torch.device) -> Runner:
    return build(random_checkpoint(config, seed, device, torch.float32), PLAN, device, torch.float32)


def law_of(name: str, target: Runner, proposer: Proposer, setting: Setting) -> Verdict:
    """Sequences that came, against their probabilities."""
    place = V ** torch.arange(NEW - 1, -1, -1)
    counts = torch.zeros(V**NEW, dtype=torch.float64)
    rounds = plain_steps = 0
    for batch in range(BATCHES):
        sampling = sampling_of(setting, seed=1000 + ROWS * batch)
        done = generate(target, [PROMPT] * ROWS, NEW, sampling, draft=proposer)
        assert done.speculation is not None
        rounds, plain_steps = rounds + done.speculation.rounds, plain_steps + done.speculation.plain_steps
        tokens = torch.tensor([completion.tokens for completion in done.completions])
        counts += torch.bincount(tokens @ place, minlength=V**NEW)
    if not rounds or (isinstance(proposer, Changing) and not plain_steps):
        return empty(
            f"{name}: law of {NEW} tokens", f"{rounds} rounds and {plain_steps} plain steps: not both were asked"
        )
    expected = joint_law(target, setting) * ROWS * BATCHES
    possible = expected > 0
    impossible = Check(f"{name}: sequences of probability 0", int(counts[~possible].sum()), 0, "", ROWS * BATCHES)
    common = possible & (expected >= LEAST)
    cells = [*zip(counts[common].tolist(), expected[common].tolist())]
    rare = possible & ~common
    if float(expected[rare].sum()) >= LEAST:
        cells.append((float(counts[rare].sum()), float(expected[rare].sum())))
    wanted = [e for _, e in cells]
    law = chi_square(f"{name}: law of {NEW} tokens", [c for c, _ in cells], wanted, len(cells) - 1)
    other = [e * (1 + 2 * SHIFT * (-1) ** i) for i, e in enumerate(wanted)]  # every second cell gives to its neighbour
    if not shows(other, wanted, len(cells) - 1):
        return empty(f"{name}: law of {NEW} tokens", f"{ROWS * BATCHES} rows do not tell a shift of {SHIFT:.0%}")
    return Verdict((impossible, law))


def joint_law(target: Runner, setting: Setting) -> Tensor:
    """The law [V^NEW] of the tokens after the prompt, in float64 from truth's logits."""
    truth, _ = references(target, target.checkpoint, orders=1)
    prefixes = list(itertools.product(range(V), repeat=NEW - 1))
    law = torch.ones(V**NEW, dtype=torch.float64)
    logits = truth.prefill_logits([(*PROMPT, *prefix) for prefix in prefixes])
    p = torch.stack([distribution(row[len(PROMPT) - 1 :], setting) for row in logits])  # [V^(NEW-1), NEW, V]
    digits = torch.tensor(list(itertools.product(range(V), repeat=NEW)))  # [V^NEW, NEW]
    of_prefix = torch.arange(V**NEW) // V
    for i in range(NEW):
        law *= p[of_prefix, i, digits[:, i]]
    return law

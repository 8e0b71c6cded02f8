"""Rows in a cache of pages: they share what they begin with, make way for each other, and answer as in slots of their own.

Asked on pages of two tokens, of which there are too few, so that short rows do all this. Nothing is asked of other caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_fast.build import rebuild
from llama_fast.caches.static import Static
from llama_fast.engine.engine import Engine
from llama_fast.engine.generate import generate
from llama_fast.engine.request import Event, Request, requests_of
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import Sampling
from llama_fast.plan import Plan
from oracle.questions.cases import random_row
from oracle.statistics.compare import Check

PAGE = 2
ROWS, AHEAD, CHUNK = 4, 2, 3
BEGIN = 6
"""Tokens that most prompts have in common."""
NEW = (3, 13, 9, 11, 7, 8)
"""Tokens that the rows of a round get."""
LONGEST_PAGED = BEGIN + 3 + 2 * max(NEW)
"""Positions of the longest row."""


@dataclass(frozen=True)
class Asked:
    """How an engine is asked: with pages for one long row and little more, or with many."""

    name: str
    sampling: Sampling
    tight: bool
    chunk: int | None = None
    ahead: int = 0
    """Steps that are launched before the oldest is read."""


ASKED = (
    Asked("few pages", Sampling(), True),
    Asked("few pages, by chunks", Sampling(1.0, seed=3), True, CHUNK, AHEAD),
    Asked("many pages", Sampling(1.0, seed=5), False),
)


def with_short_pages(plan: Plan, tokens: int | None = None) -> Plan:
    """The plan with pages of two tokens, if it has pages: so that short texts fill some."""
    cache: Any = plan.cache
    return replace(plan, cache=replace(cache, page=PAGE, tokens=tokens)) if hasattr(cache, "page") else plan


def pages_check(runner: Runner) -> list[Check]:
    """Whether rows continue otherwise than in slots of their own: at first, going on from what was said, and asked again.

    Nothing where there are no pages. Fails too where nothing was shared, or nobody made way: then nothing was asked.
    """
    name = "rows that continue otherwise in shared pages"
    if with_short_pages(runner.plan) == runner.plan:
        return []
    apart = rebuild(runner, replace(runner.plan, cache=Static()))
    V = runner.config.vocab_size
    begin, other = random_row(V, BEGIN, seed=31), random_row(V, 5, seed=40)
    firsts = [*([*begin, *random_row(V, n, seed=32 + n)] for n in (1, 3, 2)), other, [*other[:2], *begin[2:], 1]]
    firsts.append([(begin[0] + 1) % V, *begin[1:], 1])  # a page that differs in its first token alone
    longest = LONGEST_PAGED
    unlike, where, rows = 0, "", 0
    for asked in ASKED:
        tokens = longest + PAGE if asked.tight else 10 * longest
        engine = Engine(rebuild(runner, with_short_pages(runner.plan, tokens)), ROWS, longest, chunk=asked.chunk)
        prompts: list[Sequence[int]] = [*firsts]
        for which in ("first", "onward", "again"):
            made = requests(prompts, asked.sampling)
            true = [generate(apart, [one.ids], one.max_new_tokens, one.sampling).completions[0].tokens for one in made]
            if which == "first":
                made[2], true[2] = ending_early(made[2], true[2])
            said = answers(engine, made, asked.ahead)
            rows += len(said)
            wrong = [b for b, (ours, own) in enumerate(zip(said, true, strict=True)) if ours != own]
            unlike += len(wrong)
            where = where or (f"{asked.name}, {which}: row {wrong[0]}" if wrong else "")
            onward = [[*row, *new, 2] for row, new in zip(prompts, true, strict=True)]
            prompts = [*onward[1:4]] if which == "first" else [*firsts]
        if (asked.tight and not engine.pre_emptions) or not engine.reused_tokens:
            told = f"{asked.name}: {engine.pre_emptions} made way, {engine.reused_tokens} tokens were shared"
            return [Check(name, 1, 0, told, 1)]
    return [Check(name, unlike, 0, where, rows)]


def requests(prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Request]:
    """A request for each prompt, of as many new tokens as its place says."""
    made = requests_of(prompts, max(NEW), sampling)
    return [replace(request, max_new_tokens=n) for request, n in zip(made, NEW, strict=False)]


def ending_early(request: Request, tokens: list[int]) -> tuple[Request, list[int]]:
    """The request with an end id, and its answer: with the last token, which is not read, a page would be full."""
    for i, token in enumerate(tokens[:-1]):
        if token not in tokens[:i] and (len(request.ids) + i + 1) % PAGE == 0:
            return replace(request, eos_ids=[token]), tokens[: i + 1]
    return request, tokens


def answers(engine: Engine, requests: Sequence[Request], ahead: int) -> list[list[int]]:
    """The tokens of rows of which the first is answered for a while before the others come."""
    engine.steps.readback.depth = ahead  # type: ignore[attr-defined]
    ids = [engine.add(requests[0])]
    events: list[Event] = engine.step() + engine.step()
    ids += [engine.add(request) for request in requests[1:]]
    while engine.busy:
        events += engine.step()
    return [[event.token for event in events if event.id == id] for id in ids]

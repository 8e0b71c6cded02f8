"""Many requests of all kinds at random times, against what each is answered alone: on a CPU a few, on a GPU hundreds.

Requests arrive, and some are cancelled, while others are answered; greedy, drawn, filtered and penalised ones side by side, short
and long, some with a common beginning. A token that differs must be a tie: of greedy rows by the oracle's rule, of others because
the row's own uniform stands where rounding decides. What follows a tie must again be what the row is answered alone from there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import BatchSampler, Sampling, uniform
from oracle.questions.judge import Bench
from oracle.statistics.compare import Outcome
from oracle.statistics.greedy import Continuation, compare_greedy

POSITION_MAXIMUM = 5.0
"""A position's largest error, in those of the yardstick, that the oracle grants where nothing else is known."""


@dataclass(frozen=True)
class Size:
    """How many requests, of up to so many tokens of prompt and of answer."""

    requests: int
    prompt: int
    answer: int
    drawn: bool = True
    """Whether some draw, or are penalised; else all take the likeliest token."""


def requests_at_random(size: Size, vocabulary: int, seed: int) -> list[Request]:
    chance = random.Random(seed)
    begin = [chance.randrange(vocabulary) for _ in range(size.prompt // 2)]
    return [one_request(size, vocabulary, begin, chance) for _ in range(size.requests)]


def one_request(size: Size, vocabulary: int, begin: Sequence[int], chance: random.Random) -> Request:
    ids = [chance.randrange(vocabulary) for _ in range(chance.randint(1, size.prompt))]
    if chance.random() < 0.4:  # as others begin
        ids = [*begin[: len(ids) - 1], ids[-1]]
    settings = {
        "seed": chance.randrange(2**40),
        "temperature": chance.choice([0.0, 0.7, 1.0, 1.3]),
        "top_k": chance.choice([None, 3, 40]),
        "top_p": chance.choice([1.0, 1.0, 0.9]),
        "min_p": chance.choice([0.0, 0.0, 0.02]),
        "repetition_penalty": chance.choice([1.0, 1.0, 1.0, 1.2]),
        "logit_bias": chance.choice([None, None, {chance.randrange(vocabulary): 2.0}]),
    }
    sampling = Sampling(**settings) if size.drawn and chance.random() < 0.7 else Sampling()  # type: ignore[arg-type]
    ends = {chance.randrange(vocabulary) for _ in range(vocabulary // 50)} if chance.random() < 0.5 else ()
    return Request(ids, chance.randint(1, size.answer), sampling, ends)


@dataclass
class Played:
    """What the engine said: the tokens of each request, and which were cancelled."""

    tokens: list[list[int]] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)


def played(engine: Engine, requests: Sequence[Request], seed: int) -> Played:
    """All requests, some at each step as it happens; at one step in ten one of the latest is cancelled, if it has not ended."""
    chance, found, waiting = random.Random(seed), Played(), list(reversed(requests))
    numbers: dict[int, int] = {}
    while waiting or engine.busy:
        for _ in range(chance.choice([0, 0, 0, 1, 2, 7])):
            if waiting:
                numbers[engine.add(waiting.pop())] = len(found.tokens)
                found.tokens.append([])
                found.reasons.append(None)
        if found.tokens and chance.random() < 0.1:
            id = chance.choice(list(numbers)[-12:])
            if engine.cancel(id):
                found.cancelled.add(numbers[id])
        for event in engine.step():
            number = numbers[event.id]
            assert number not in found.cancelled, "nothing is told of a row that nobody wants"
            found.tokens[number].append(event.token)
            found.reasons[number] = event.finish_reason
    return found


class Alone:
    """One slot, where every request is answered by itself."""

    def __init__(self, runner: Runner, length: int, bench: Bench):
        self.engine, self.bench = Engine(runner, 1, length), bench

    def answer(self, request: Request) -> list[int]:
        self.engine.add(request)
        tokens = []
        while self.engine.busy:
            tokens += [event.token for event in self.engine.step()]
        return tokens

    def ties(self, request: Request, said: Sequence[int], whole: bool) -> int:
        """How many ties stand between what was said and the answer alone. AssertionError for what is none.

        `whole`: the answer was not cut short.
        """
        ties = 0
        while True:
            own = self.answer(request)
            at = next((i for i, (a, b) in enumerate(zip(said, own)) if a != b), None)
            if at is None:
                assert len(said) == len(own) if whole else len(said) <= len(own), (request, said, own)
                return ties
            assert self.is_tie(request, said[:at], (said[at], own[at])), (request, at, said[at], own[at])
            ties += 1
            said, ids = said[at + 1 :], [*request.ids, *said[: at + 1]]
            left = request.max_new_tokens - at - 1
            if not left or ids[-1] in request.eos_ids:
                assert not said
                return ties
            request = replace(request, ids=ids, max_new_tokens=left)

    def is_tie(self, request: Request, before: Sequence[int], pair: tuple[int, int]) -> bool:
        """Whether rounding may decide between two tokens behind these."""
        row = [*request.ids, *before]
        (truth_TV, yardstick_TV), sampling = self.bench.of([row])[0], request.sampling
        truth_V, yardstick_V = truth_TV[-1].double(), yardstick_TV[..., -1, :]
        if sampling == replace(Sampling(), seed=sampling.seed):
            run = Continuation([pair[0]], None, truth_TV[-1:], yardstick_TV[..., -1:, :])
            return compare_greedy([run], self.bench.unit).outcome is Outcome.AGREE
        error = POSITION_MAXIMUM * float((yardstick_V.double() - truth_V).abs().max())
        choose = BatchSampler.of_free_rows(1, truth_V.device, len(truth_V))
        choose.set_rows(0, [sampling], [row], [()])
        edited_1V = choose.edited(truth_V[None])
        if not sampling.temperature:
            margin = float(edited_1V.max() - edited_1V[0, list(pair)].min())
            return margin <= 2 * error * max(sampling.repetition_penalty, 1 / sampling.repetition_penalty)
        p_V = choose.probabilities(edited_1V)[0].double()
        upper_V = p_V.cumsum(0) / p_V.sum()
        u = float(uniform(choose.key_B2, torch.tensor([len(row)], device=truth_V.device))[0])
        slack = math.expm1(4 * error / sampling.temperature) + 1e-7  # float32 probabilities are summed in their order
        return all(float(upper_V[t] - p_V[t]) - slack <= u <= float(upper_V[t]) + slack for t in pair)


def judged(alone: Alone, requests: Iterable[Request], found: Played) -> int:
    """The ties of all rows; AssertionError for a row that is not answered as alone."""
    ties = 0
    for number, request in enumerate(requests):
        said, whole = found.tokens[number], number not in found.cancelled
        ties += alone.ties(request, said, whole)
        if whole:
            assert found.reasons[number] == ("stop" if said[-1] in request.eos_ids else "length"), request
    return ties

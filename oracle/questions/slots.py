"""Rows that come and go: an engine of few slots answers many requests, each as it would be answered alone.

A request joins while others decode, in a slot that served another one: whose keys and values, end ids, seed, filter, penalised
tokens and log-probabilities must not reach it, and whose position it must not take over. The model is a walker
(oracle.subjects.walkers), whose greedy text is known beforehand; what is drawn or penalised is compared with an engine of one
slot. Counted are tokens of rows in a slot that served another before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from llama_fast.engine.engine import Engine
from llama_fast.engine.logprobs import TokenLogprob
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import Sampling
from oracle.questions.face import PENALTY, PROMPTS, Faces, close, ids_of, shown, wanted
from oracle.questions.survival import survived
from oracle.questions.tally import Tally
from oracle.statistics.compare import Verdict

SLOTS, LENGTH, LONG = 3, 96, 24
CANCELLED_AFTER = 4
"""Tokens of each third request, of which then nobody wants more."""


@dataclass(frozen=True)
class Answer:
    """What a request got: tokens, the reason of its end, and log-probabilities where it asked for them."""

    tokens: list[int]
    reason: str | None
    logprobs: list[TokenLogprob]


def requests() -> list[Request]:
    """Unlike neighbours in every way: greedy, drawn, filtered, penalised, ended by an id, told log-probabilities; long, short."""
    greedy = [ids_of(prompt) for prompt in PROMPTS]
    held = ids_of("D " + shown([*range(20, 60)]))
    end = wanted(PROMPTS[1], 12)[-1]
    drawn = [Sampling(1.0, seed=seed) for seed in (71, 5, 2**40 + 3)]
    return [
        Request(greedy[0], 9),
        Request(greedy[1], LONG, eos_ids=(end,)),
        Request(greedy[3], 15, drawn[0], logprobs=2),
        Request(greedy[2], 3),
        Request(greedy[1], LONG),  # the end of the one before is none of its own
        Request(held, 12, Sampling(repetition_penalty=PENALTY)),
        Request(greedy[0], 14, logprobs=1),
        Request(greedy[3], LONG, drawn[1]),
        Request(held[:9], 10),  # which nothing lowers
        Request(greedy[3], 8, Sampling(2.0, top_k=1, seed=9)),
        Request(greedy[2], 1),
        Request(held[:-6], 11, Sampling(0.9, seed=4, repetition_penalty=PENALTY)),
        Request(greedy[3], 20, drawn[2]),
        Request(greedy[1], 5, eos_ids=(end,)),
    ]


def judge_slots(faces: Faces) -> Verdict:
    """All requests at once, one joining at a time, and in slots that keep prefixes."""
    ways = {
        "queued together": partial(_come_and_go, faces),
        "joining one by one": partial(_come_and_go, faces, apart=True),
        "behind kept prefixes": partial(_come_and_go, faces, keeps_prefixes=True),
    }
    return sum((survived(name, partial(_told, name, ask)) for name, ask in ways.items()), Verdict())


def _told(name: str, ask: partial[Tally]) -> Verdict:
    return Verdict((ask().check(name),))


def _come_and_go(faces: Faces, apart: bool = False, keeps_prefixes: bool = False) -> Tally:
    tally, runner = Tally("tokens in slots that served before"), faces.llama().runner
    asked = requests()
    alone = [answers(Engine(runner, 1, LENGTH), [one])[0] for one in asked]
    for one, answer in zip(asked, alone, strict=True):
        if not one.sampling.temperature and one.sampling.repetition_penalty == 1:
            tally.see("alone", answer.tokens, _walked(one), 0)
    several = [*asked, *asked[::-1]]
    engine = Engine(runner, SLOTS, LENGTH, keeps_prefixes=keeps_prefixes)
    said = answers(engine, several, apart, cancels=True)
    if keeps_prefixes and not engine.reused_tokens:
        return Tally("tokens that a slot held already")
    for number, (answer, true) in enumerate(zip(said, [*alone, *alone[::-1]], strict=True)):
        told, fresh = f"request {number}", number >= SLOTS
        if number % SLOTS == 2 and len(true.tokens) > CANCELLED_AFTER:
            tally.see(told, answer.tokens, true.tokens[:CANCELLED_AFTER], CANCELLED_AFTER * fresh)
            continue
        tally.see(told, (answer.tokens, answer.reason), (true.tokens, true.reason), len(true.tokens) * fresh)
        tally.see(f"{told}, log-probabilities", _alike(answer.logprobs, true.logprobs), True, 0)
    return tally


def _walked(request: Request) -> list[int]:
    """What a walker says to a request that takes the likeliest tokens."""
    tokens = wanted(shown(request.ids), request.max_new_tokens)
    end = next((i + 1 for i, token in enumerate(tokens) if token in request.eos_ids), None)
    return tokens[:end]


def _alike(told: Sequence[TokenLogprob], true: Sequence[TokenLogprob]) -> bool | str:
    if [(one.token, len(one.top)) for one in told] != [(one.token, len(one.top)) for one in true]:
        return "of other tokens, or of more or fewer"
    values = [[value for one in each for value in (one.logprob, *sorted(one.top.values()))] for each in (told, true)]
    return close(*values) if values[1] else True


def answers(engine: Engine, asked: Sequence[Request], apart: bool = False, cancels: bool = False) -> list[Answer]:
    """What each request got. `apart`: one is added at every second step; `cancels`: each third ends after a few tokens."""
    waiting, ids, found = list(asked), list[int](), list[Answer]()
    step, most = 0, 2 * len(asked) + 4 * sum(one.max_new_tokens for one in asked)
    while waiting or engine.busy:
        if step == most:
            raise RuntimeError(f"the engine is still busy after {most} steps")
        for _ in range(0 if apart and step % 2 else min(1 if apart else len(waiting), len(waiting))):
            ids.append(engine.add(waiting.pop(0)))
            found.append(Answer([], None, []))
        for event in engine.step():
            number = ids.index(event.id)
            tokens, logprobs = found[number].tokens, found[number].logprobs
            tokens.append(event.token)
            logprobs += [] if event.logprob is None else [event.logprob]
            found[number] = Answer(tokens, event.finish_reason, logprobs)
            if cancels and number % SLOTS == 2 and len(tokens) == CANCELLED_AFTER:
                engine.cancel(event.id)
        step += 1
    return found

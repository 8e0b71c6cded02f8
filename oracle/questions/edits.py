"""Biases, penalties and grammars on trial: rows of different wishes share two slots, and each has the law of its own.

The law is the reference's (`llama_ref.generate.Adjusted`) on the reference's float64 logits of a walker. A grammar here is a rule
that is worked out by hand: which ids may come depends on the place in the row alone. Counted are tokens that were moved: what the
row would have without its wish is another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama_fast.engine.engine import Engine
from llama_fast.engine.guides import Guide
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import Sampling
from llama_fast.llama import Llama
from llama_ref.generate import Adjusted
from oracle.questions.tally import Tally
from oracle.subjects.subject import Subject

NEW = 14
CLEAR = {0.0: 1e-3, 0.01: 0.3}
"""By temperature, how far ahead a logit must be for its token to be certain."""
WISHES = (
    Adjusted(frequency_penalty=3.0, logit_bias={10: 20.0, 20: 17.5}),
    Adjusted(presence_penalty=9.0, logit_bias={10: 20.0, 11: 15.0, 12: 14.0}),
    Adjusted(),
    Adjusted(frequency_penalty=-2.5, logit_bias={20: 9.0}),
    Adjusted(1.3, 2.0, -1.0, {30: 16.0, 5: -100.0}),
    Adjusted(presence_penalty=-8.0),
)


class Turns:
    """Of all ids, those that leave this remainder when divided by 3 may come; one more at the next place."""

    ends: Sequence[int] = ()
    failure: str | None = None
    complete = False

    def __init__(self, remainder: int):
        self._first = self._next = remainder

    def begin(self) -> Guide:
        return Turns(self._first)

    def allow(self, words_W: Tensor) -> None:
        words_W.zero_()
        for word in range(len(words_W)):
            bits = sum(1 << bit for bit in range(32) if (32 * word + bit) % 3 == self._next % 3)
            words_W[word] = bits if bits < 2**31 else bits - 2**32

    def take(self, token: int) -> None:
        self._next += 1


def adjusted_tokens(llama: Llama, truth: Subject, prompts: Sequence[Sequence[int]]) -> Tally:
    """Every wish behind every prompt, greedy and so cold that it is as good as greedy."""
    tally = Tally("tokens that a wish moves")
    for temperature, clear in CLEAR.items():
        asked = [(wish, [*prompt]) for prompt in prompts for wish in WISHES]
        settings = [
            Sampling(
                temperature,
                seed=b,
                repetition_penalty=wish.repetition_penalty,
                frequency_penalty=wish.frequency_penalty,
                presence_penalty=wish.presence_penalty,
                logit_bias=wish.logit_bias,
            )
            for b, (wish, _) in enumerate(asked)
        ]
        rows = _answers(llama, [(prompt, one) for (_, prompt), one in zip(asked, settings, strict=True)])
        laws = truth.prefill_logits([prompt + row for (_, prompt), row in zip(asked, rows, strict=True)])
        for (wish, prompt), row, logits_TV in zip(asked, rows, laws, strict=True):
            for i, token in enumerate(row):
                plain_V = logits_TV[len(prompt) + i - 1]
                law_V = wish.of(plain_V, prompt, row[:i])
                one, two = law_V.topk(2).values.tolist()
                if one - two > clear:
                    best = int(law_V.argmax())
                    tally.see(f"{wish}, token {i}", token, best, best != int(plain_V.argmax()))
    return tally


def allowed_tokens(llama: Llama, truth: Subject, prompts: Sequence[Sequence[int]]) -> Tally:
    """Rows with a grammar, each at another place of it, beside rows without; greedy, cold and hot."""
    tally = Tally("tokens that a grammar moves")
    for temperature, clear in {**CLEAR, 1.5: 0.0}.items():
        asked = [([*prompt], remainder) for prompt in prompts for remainder in (0, None, 2, 1)]
        settings = [
            Sampling(temperature, seed=b, grammar=None if remainder is None else Turns(remainder))
            for b, (_, remainder) in enumerate(asked)
        ]
        rows = _answers(llama, [(prompt, one) for (prompt, _), one in zip(asked, settings, strict=True)])
        laws = truth.prefill_logits([prompt + row for (prompt, _), row in zip(asked, rows, strict=True)])
        for (prompt, remainder), row, logits_TV in zip(asked, rows, laws, strict=True):
            for i, token in enumerate(row):
                law_V = logits_TV[len(prompt) + i - 1].double().clone()
                plain = int(law_V.argmax())
                if remainder is not None:
                    law_V[torch.arange(len(law_V), device=law_V.device) % 3 != (remainder + i) % 3] = -torch.inf
                    tally.see(f"temperature {temperature}: remainder of token {i}", token % 3, (remainder + i) % 3)
                one, two = law_V.topk(2).values.tolist()
                if temperature <= max(CLEAR) and one - two > clear:
                    best = int(law_V.argmax())
                    tally.see(f"temperature {temperature}: token {i}", token, best, best != plain)
    return tally


def _answers(llama: Llama, asked: Sequence[tuple[Sequence[int], Sampling]]) -> list[list[int]]:
    """Each row's tokens: two at a time, the third when one of them has ended."""
    longest = max(len(prompt) for prompt, _ in asked)
    engine = Engine(llama.runner, rows=2, length=longest + NEW)
    rows: list[list[int]] = [[] for _ in asked]
    for b, (prompt, sampling) in enumerate(asked):
        engine.add(Request(prompt, NEW - b % 3, sampling))  # rows end at different steps
    while engine.busy:
        for event in engine.step():
            rows[event.id].append(event.token)
    return rows

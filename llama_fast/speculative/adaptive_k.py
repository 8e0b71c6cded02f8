"""How many tokens to propose: arithmetic on what a round costs and how often a proposal stands.

With acceptance a (the probability that a proposal stands if those before it do) a round of k proposals emits on average

    E(a, k) = 1 + a + ... + a^k = (1 - a^(k+1)) / (1 - a)        tokens,

and costs v + k c plain decode steps, where c is the cost of one proposal and v that of checking k of them at once. So it is

    speedup(a, k, c, v) = (1 - a^(k+1)) / ((1 - a) (v + k c))

times as fast as plain decoding. The usual form of the formula has v = 1; a real check of k + 1 rows costs more than a step.

`AdaptiveK` keeps the measured costs and acceptance of one generation, and an account: what speculation has won or lost so far in
plain steps. It may lose a small share of the request while it finds out. When that is spent, proposals that cost nothing (a
lookup's) are still compared with what plain steps choose: what they would have won pays for new trials.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PLAIN, DRAFT = 0, -1
"""Kinds of cost beside k >= 1, the check of k proposals: a plain step, and one proposed token."""

KEPT_SAMPLES = 9
A_DRAFT = (0.9, 10.0)
"""What is guessed of a draft model's acceptance, and how many proposals the guess counts for: one that falls says little yet."""


def expected_tokens(a: float, k: int) -> float:
    """E(a, k): (0.5, 2) -> 1.75, (1.0, 5) -> 6."""
    return float(k + 1) if a >= 1 else (1 - a ** (k + 1)) / (1 - a)


def speedup(a: float, k: int, c: float, v: float = 1.0) -> float:
    """Over plain decoding: a=0.9, k=5, c=0.25 -> 2.08."""
    return expected_tokens(a, k) / (v + k * c)


@dataclass
class Costs:
    """Seconds of each kind of work, medians of the last samples; `agree` makes all processes of a group see the same.

    A group's members must decide alike, and each measures its own time: so a median that may be asked for is agreed on
    at once, at sample counts that are the same everywhere.
    """

    agree: Callable[[float], float] = lambda seconds: seconds
    samples: dict[int, list[float]] = field(default_factory=dict)
    medians: dict[int, float] = field(default_factory=dict)

    def add(self, kind: int, seconds: float) -> None:
        """A sample; the very first of a kind counts only until there is a second, as caches were cold."""
        seen = self.samples.setdefault(kind, [])
        seen.append(seconds)
        settled = seen[1:] if len(seen) > 1 else seen
        self.medians[kind] = self.agree(statistics.median(settled))
        if len(seen) > KEPT_SAMPLES:
            del seen[1]

    def count(self, kind: int) -> int:
        return len(self.samples.get(kind, ()))

    @property
    def c(self) -> float | None:
        """One proposal, in plain steps; None before both were measured."""
        return self._relative(DRAFT)

    def v(self, k: int) -> float | None:
        """The check of k proposals, in plain steps; for a k not yet measured that of the nearest one."""
        measured = [kind for kind in self.medians if kind > 0]
        return self._relative(min(measured, key=lambda kind: abs(kind - k))) if measured else None

    def _relative(self, kind: int) -> float | None:
        if PLAIN not in self.medians or kind not in self.medians:
            return None
        return self.medians[kind] / self.medians[PLAIN]


@dataclass
class Acceptance:
    """A running estimate of a: old evidence fades, and at first there is a guess, as if `guessed_from` proposals said it."""

    guess: float
    guessed_from: float
    fading: float = 0.97
    recovery: float = 0.01
    stood: float = field(init=False)
    tried: float = field(init=False)

    def __post_init__(self) -> None:
        self.stood, self.tried = self.guess * self.guessed_from, self.guessed_from

    def add(self, stood: int, proposed: int) -> None:
        """One round: `stood` of `proposed`; those after the first that fell were not tried."""
        self.stood = self.stood * self.fading + stood
        self.tried = self.tried * self.fading + stood + (stood < proposed)

    def rest(self) -> None:
        """A plain step: the text moves on, and the first guess slowly comes back."""
        self.stood += self.recovery * (self.guess * self.guessed_from - self.stood)
        self.tried += self.recovery * (self.guessed_from - self.tried)

    @property
    def rate(self) -> float:
        return self.stood / self.tried


@dataclass
class Imagined:
    """A round that was not run: which rows' first guesses were right so far, step by step, and how often in turn."""

    k: int
    evidence: list[int]
    running: list[bool]
    stood: list[int]

    def step(self, hits: Sequence[bool]) -> bool:
        """One plain step's choice against what was guessed for it; whether the round is over."""
        self.running = [was and hit for was, hit in zip(self.running, hits, strict=True)]
        self.stood = [n + was for n, was in zip(self.stood, self.running, strict=True)]
        return not any(self.running) or max(self.stood) == self.k


@dataclass
class AdaptiveK:
    """Chooses k, round by round. `ks`: those that may be chosen; `new_tokens`: the length of the request.

    Evidence of a proposal's quality (the length of an n-gram's match; 0 for a draft model) has an estimate of its own each;
    -1 means that nothing was proposed. `guess` is made of each before anything is known, as (acceptance, the proposals it
    counts for).
    """

    ks: Sequence[int]
    costs: Costs
    new_tokens: int
    guess: Callable[[int], tuple[float, float]] = lambda evidence: A_DRAFT
    share: float = 0.02
    balance: float = 0.0  # plain steps won by speculating, less those lost
    estimates: dict[int, Acceptance] = field(default_factory=dict)
    plain_samples: int = 2
    imagined: Imagined | None = None
    would_have_won: float = 0.0

    def renew(self, ks: Sequence[int], costs: Costs, new_tokens: int) -> None:
        """A row joins others: trials may be made for its sake too. What is known of acceptance stays known."""
        self.ks, self.costs, self.new_tokens = ks, costs, max(new_tokens, self.new_tokens)
        self.balance, self.imagined = max(self.balance, 0.0), None

    @property
    def knows_plain(self) -> bool:
        """Whether plain steps have been timed."""
        return self.costs.count(PLAIN) >= self.plain_samples

    def choose(self, evidence: Sequence[int], remaining: int) -> int:
        """The k for rows with this evidence, of which the longest still wants `remaining` tokens; 0 is a plain step."""
        ks = [k for k in self.ks if k < remaining and self.may_lose(k)]
        if not ks or not self.knows_plain:
            return 0
        best = max(ks, key=lambda k: self.worth(k, evidence))
        return best if self.worth(best, evidence) > 1 else 0

    def worth(self, k: int, evidence: Sequence[int]) -> float:
        """The expected speed-up of a round; what is not yet measured is taken to be cheap, so that it is measured."""
        tokens = [1.0 if of < 0 else expected_tokens(self.estimate(of).rate, k) for of in evidence]
        return sum(tokens) / len(tokens) / self.cost(k)

    def cost(self, k: int) -> float:
        """A round of k in plain steps."""
        v, c = self.costs.v(k), self.costs.c
        return (1.0 if v is None else v) + k * (0.0 if c is None else c)

    def estimate(self, of: int) -> Acceptance:
        return self.estimates.setdefault(of, Acceptance(*self.guess(of)))

    def record(self, k: int, evidence: Sequence[int], stood: Sequence[int], emitted: Sequence[int]) -> None:
        """A round is over: how many proposals stood and how many tokens came, for every row that still counts."""
        self.learn(k, evidence, stood)
        self.imagined = None
        # what was won is not there to be lost again
        self.balance = min(self.balance + sum(emitted) / len(emitted) - self.cost(k), self.credit)

    def learn(self, k: int, evidence: Sequence[int], stood: Sequence[int]) -> None:
        for of, n in zip(evidence, stood, strict=True):
            if of >= 0:
                self.estimate(of).add(n, k)

    def rest(self) -> None:
        """A plain step was taken."""
        for estimate in self.estimates.values():
            estimate.rest()

    def watch(self, evidence: Sequence[int], hits: Sequence[bool]) -> None:
        """Beside a plain step a token was guessed for each row (evidence -1: none), and it was chosen, or not.

        Rounds are imagined from such steps. Their wins add up, their losses take away down to nothing: what is then there
        was won by a stretch of text that repeats, and balances the account once it is spent.
        """
        if not self.ks:
            return
        if self.imagined is not None and len(self.imagined.running) != len(evidence):
            self.imagined = None  # rows have ended
        if self.imagined is None:
            if max(evidence, default=-1) < 0:
                return
            best = max(self.ks, key=lambda k: self.worth(k, evidence))
            self.imagined = Imagined(best, list(evidence), [of >= 0 for of in evidence], [0] * len(evidence))
        round_ = self.imagined
        if not round_.step(hits):
            return
        self.imagined = None
        self.learn(round_.k, round_.evidence, round_.stood)
        won = 1 + sum(round_.stood) / len(round_.stood) - self.cost(round_.k)
        self.would_have_won = max(0.0, self.would_have_won + won)
        if self.balance < 0 and self.would_have_won >= self.credit:
            self.balance, self.would_have_won = 0.0, 0.0

    @property
    def credit(self) -> float:
        """The plain steps that trials may cost."""
        return max(1.0, self.share * self.new_tokens)

    def may_lose(self, k: int, under_way: Sequence[int] = ()) -> bool:
        """Whether the account covers a round of k of which nothing stands, nor of those not yet read; the first is on trust."""
        balance = self.balance - sum(self.cost(of) - 1 for of in under_way)
        return balance >= min(0.0, self.cost(k) - 1 - self.credit)

    def covers(self, k: int, under_way: Sequence[int], remaining: int) -> bool:
        """Whether a round of k may follow rounds that are not yet read.

        The account covers them all, and after what they are likely to bring of the `remaining` tokens more than k are wanted.
        """
        rate = self.estimate(0).rate
        likely = sum(expected_tokens(rate, of) for of in under_way)
        return k < remaining - likely and self.may_lose(k, under_way)

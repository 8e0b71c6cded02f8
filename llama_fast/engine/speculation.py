"""What generation knows of speculation: somebody continues prompts several tokens at a time, and counts.

Shapes: K proposed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llama_fast.contracts import KVCache
from llama_fast.engine.request import Request, Row
from llama_fast.engine.runner import Runner
from llama_fast.engine.steps import Stepper


@dataclass
class Statistics:
    """What speculation did. A round is one check of K proposals by the target, counted for each row that still ran."""

    proposer: str = ""
    rounds: int = 0
    proposed: int = 0
    tried: int = 0
    """Proposals that were judged: those up to the first that fell."""
    accepted: int = 0
    emitted: int = 0
    """Tokens of all rounds: the accepted ones, and one of the target's own in each."""
    plain_steps: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    """How many rounds accepted n proposals."""
    ks: dict[int, int] = field(default_factory=dict)
    """How many rounds proposed k."""
    draft_cost: float | None = None
    """One proposal in plain steps: c."""
    check_cost: dict[int, float] = field(default_factory=dict)
    """The check of k proposals in plain steps: v."""
    notice: str = ""

    @property
    def acceptance(self) -> float:
        """The share of judged proposals that stood: the a of `adaptive_k.speedup`; 0 if none was judged."""
        return self.accepted / self.tried if self.tried else 0.0

    @property
    def decoded(self) -> int:
        """Tokens of rounds and plain steps, at batch 1."""
        return self.emitted + self.plain_steps

    @property
    def tokens_per_round(self) -> float:
        return self.emitted / self.rounds if self.rounds else 0.0

    def round(self, k: int, stood: int, emitted: int, seen: int) -> None:
        """Count one row's round: of its k proposals `seen` were in the check and `stood` stood; `emitted` tokens were wanted."""
        self.rounds += 1
        self.proposed += k
        self.tried += stood + (stood < seen)
        self.accepted += stood
        self.emitted += emitted
        self.lengths = added(self.lengths, {stood: 1})
        self.ks = added(self.ks, {k: 1})

    def __add__(self, other: Statistics) -> Statistics:
        """Two generations together; costs and notice are the later one's, where it has them."""
        return Statistics(
            other.proposer or self.proposer,
            self.rounds + other.rounds,
            self.proposed + other.proposed,
            self.tried + other.tried,
            self.accepted + other.accepted,
            self.emitted + other.emitted,
            self.plain_steps + other.plain_steps,
            added(self.lengths, other.lengths),
            added(self.ks, other.ks),
            other.draft_cost if other.draft_cost is not None else self.draft_cost,
            other.check_cost or self.check_cost,
            other.notice or self.notice,
        )

    def as_json(self) -> dict[str, Any]:
        """Every number, and the two rates."""
        return {**vars(self), "acceptance": self.acceptance, "tokens_per_round": self.tokens_per_round}

    def lines(self) -> list[str]:
        """What a person reads."""
        if not self.rounds:
            said = [f"Speculation ({self.proposer}): no proposals, {self.plain_steps} plain steps"]
        else:
            bars = "  ".join(f"{n}: {count}" for n, count in sorted(self.lengths.items()))
            rates = f"acceptance {self.acceptance:.1%}, {self.tokens_per_round:.2f} tokens per round"
            counts = f"{self.rounds} rounds, {self.plain_steps} plain steps"
            said = [f"Speculation ({self.proposer}): {rates}, {counts}", f"Accepted lengths: {bars}"]
        return [*said, f"Notice: {self.notice}"] if self.notice else said


def added(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    """Counts together, in order: {1: 2}, {0: 1, 1: 1} -> {0: 1, 1: 3}."""
    return {key: one.get(key, 0) + other.get(key, 0) for key in sorted({*one, *other})}


class Rounds(Stepper, Protocol):
    """A stepper that counts what was proposed and what stood."""

    statistics: Statistics


class Speculation(Protocol):
    """A way to propose tokens: a draft model, or a lookup in what was written so far."""

    @property
    def slack(self) -> int:
        """Cache slots it wants beyond those of the request."""

    @property
    def held_bytes(self) -> int:
        """Memory of its weights and caches."""

    def read_bytes(self, statistics: Statistics) -> float:
        """Bytes of weights that its proposals read."""

    def check(self, target: Runner, requests: Sequence[Request], capacity: int | None) -> int:
        """Positions that are left for proposals in rows of so many; ValueError, with the numbers, for what cannot be."""

    def begin(self, target: Runner, slots: Sequence[Row | None], cache: KVCache, length: int) -> Rounds:
        """The steps of rows of up to `length` positions, which come and go in these slots: the engine's own list."""

"""What a question about texts counts: a question in which nothing happened has seen nothing."""

from __future__ import annotations

from oracle.statistics.compare import Check


class Tally:
    """What a question compared: events that could have shown a fault, and what came out otherwise."""

    def __init__(self, events: str):
        self.events, self.count, self.wrong = events, 0, list[str]()

    def see(self, what: str, said: object, wanted: object, events: int = 1) -> None:
        self.count += events
        if said != wanted:
            self.wrong.append(f"{what}: {said!r:.60} instead of {wanted!r:.60}")

    def check(self, name: str) -> Check:
        where = self.wrong[0] if self.wrong else ("" if self.count else f"no {self.events}")
        return Check(f"{name}: answers that are others", len(self.wrong), 0, where, self.count or len(self.wrong))

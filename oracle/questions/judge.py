"""One subject against one truth on one case: prefill, decoding at every split, greedy continuations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llama_ref.arguments import made, shown
from oracle.questions.cases import Case
from oracle.statistics.budget import Factors
from oracle.statistics.compare import Check, Curve, Verdict, compare_logits, curves, empty, unit_roundoff
from oracle.statistics.greedy import Continuation, compare_greedy, not_as_asked
from oracle.subjects.subject import ManyRoutes, Route, Subject


class Bench:
    """Truth and yardstick, and what they said: no row is computed twice.

    Both see whole rows without a cache, so one pass over the longest form of a row serves every split of it.
    """

    def __init__(self, truth: Subject, yardstick: Subject, factors: Factors | None = None):
        self.truth = truth
        self.yardstick = yardstick
        self.unit = unit_roundoff(yardstick.dtype)
        self.factors = factors  # None: what the unit and the yardstick's number of orders give
        self.curves: list[Curve] = []
        """Of the last prefill that was judged: error against position."""
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def of(self, rows: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """(truth [T_b, V], yardstick [T_b, V] or [O, T_b, V]) of each row, those not yet known in one padded pass."""
        keys = [tuple(row) for row in rows]
        fresh = [key for key in dict.fromkeys(keys) if key not in self._known]
        if fresh:
            both = zip(self.truth.prefill_logits(fresh), self.yardstick.prefill_logits(fresh), strict=True)
            self._known |= dict(zip(fresh, both, strict=True))
        return [self._known[key] for key in keys]

    def prefill(self, subject: Subject, rows: Sequence[Sequence[int]]) -> Verdict:
        """All positions of each row at once."""
        if not rows:
            return empty("prefill", "no rows")
        known = self.of(rows)
        found = subject.prefill_logits(rows)
        truths, plains = [t for t, _ in known], [y for _, y in known]
        self.curves = curves(found, truths, plains, self.unit)
        return compare_logits(found, truths, plains, self.unit, factors=self.factors)

    def decode(
        self, subject: Subject, rows: Sequence[Sequence[int]], splits: Sequence[int], ends: Sequence[int]
    ) -> Verdict:
        """Token by token after a prefill of `splits` tokens; rows are cut to `ends`."""
        return self.route(subject.decode_logits, rows, splits, ends)

    def route(self, route: Route, rows: Sequence[Sequence[int]], splits: Sequence[int], ends: Sequence[int]) -> Verdict:
        """Logits from `splits` on, by whatever way the subject takes."""
        if not rows:
            return empty("decode", "no rows")
        known = self.of(rows)
        found = route([row[:end] for row, end in zip(rows, ends, strict=True)], splits)
        wanted = [
            (truth[split - 1 : end], plain[..., split - 1 : end, :])
            for (truth, plain), split, end in zip(known, splits, ends, strict=True)
        ]
        truths, plains = [t for t, _ in wanted], [y for _, y in wanted]
        starts = [split - 1 for split in splits]
        return compare_logits(found, truths, plains, self.unit, starts, self.factors)

    def greedy(self, subject: Subject, prompts: Sequence[Sequence[int]], n: int) -> Verdict:
        """The subject's own continuations: the logits it chose from, and the choices."""
        if not prompts:
            return empty("greedy", "no prompts")
        done = subject.greedy(prompts, n)
        said = [tokens for tokens, _ in done]
        if not any(said):
            return empty("tokens", f"no tokens, asked {n} after each prompt")
        wrong = not_as_asked(said, len(prompts), n)
        if wrong:
            return Verdict((Check("tokens", 1.0, 0.0, wrong),))
        continued = [[*prompt, *tokens] for prompt, (tokens, _) in zip(prompts, done, strict=True)]
        if any(not 0 <= token < self.truth.vocab_size for row in continued for token in row):
            return Verdict((Check("tokens outside the vocabulary", 1.0, 0.0),))
        starts = [len(prompt) - 1 for prompt in prompts]
        known = [(t[at:-1], y[..., at:-1, :]) for (t, y), at in zip(self.of(continued), starts, strict=True)]
        truths, plains = [t for t, _ in known], [y for _, y in known]
        logits = compare_logits([shown for _, shown in done], truths, plains, self.unit, starts, self.factors)
        if not logits.checks[0].ok:  # not even comparable: shapes or NaN
            return logits
        runs = [Continuation(tokens, shown, t, y) for (tokens, shown), (t, y) in zip(done, known, strict=True)]
        return logits + compare_greedy(runs, self.unit, self.factors)


def judge(subject: Subject, bench: Bench, case: Case) -> Verdict:
    """All that a case asks of a subject. Fewer rows, tokens or positions than asked are DIFFER, none at all EMPTY."""
    made("subject", subject, "a Subject", "prefill_logits", "decode_logits", "greedy")
    made("bench", bench, "a Bench: truth and yardstick", "prefill", "decode", "route")
    if not isinstance(case, Case):
        raise TypeError(f"case={shown(case)} must be a Case")
    vocabulary = bench.truth.vocab_size
    for token in (token for row in (*case.rows, *case.prompts) for token in row):
        if not 0 <= token < vocabulary:
            raise ValueError(f"case: token id {token} is outside the vocabulary of {vocabulary}")
    verdict = bench.prefill(subject, case.rows).named("prefill")
    for split in case.splits:
        cut = bench.decode(subject, case.rows, split.starts, split.ends)
        verdict += cut.named(f"decode from {'/'.join(map(str, split.starts))}")
    if isinstance(subject, ManyRoutes) and case.rows:
        for name, (route, at) in subject.routes().items():
            split = case.splits[at]
            verdict += bench.route(route, case.rows, split.starts, split.ends).named(name)
    return verdict + bench.greedy(subject, case.prompts, case.new_tokens).named("greedy")

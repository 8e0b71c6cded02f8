"""Speculative decoding: several tokens are proposed cheaply and checked by the target in one step.

Where plain decoding reads all weights for one token, a round reads them for as many as were guessed right, and one more. The
answer stays the target's: the tokens at temperature 0, the distribution otherwise.

    generate(target, prompts, 200, draft=Draft(small))            a draft model, k chosen from what is measured
    generate(target, prompts, 200, draft=Ngram(k=8))              a lookup in what was written so far, k fixed
    generate(target, prompts, 200, draft=Padded(k=5))             no speculation, but its arithmetic

A check of k + 1 rows rounds differently from a step of one, so greedy equality with plain decoding holds up to ties of
the rounding. `Padded(k)` decodes plainly through checks of that shape, and `Draft(runner, k, aligned=True)` and
`Ngram(k, aligned=True)` equal it bit for bit. The shape alone would not do: a matrix product may round its seventh row
otherwise than its first. So a position has its fixed row in an aligned check, and proposals that reach past the end of its
window are lost: in the round after a rejection all but k / 2 on average.

Shapes: B rows, K proposed tokens, V vocabulary.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llama_fast.contracts import KVCache
from llama_fast.engine.caches import Caches, part_of
from llama_fast.engine.request import Request, Row
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import BatchSampler
from llama_fast.engine.speculation import Statistics
from llama_fast.model.roofline import stored_bytes, weight_bytes_per_step
from llama_fast.speculative.adaptive_k import A_DRAFT, Costs
from llama_fast.speculative.clock import agreement
from llama_fast.speculative.ngrams import Text
from llama_fast.speculative.rounds import Manner, Rounds
from llama_fast.speculative.source import NO_GUESS, Compilations, Source, Terms
from llama_fast.speculative.verification import State
from llama_ref.arguments import flag, made, whole

AUTOMATIC = (1, 2, 4, 7)
"""What k is chosen from: between these the speed hardly changes. 7 proposals and the newest token are eight rows."""
CHEAP_ROWS = 8
"""Rows, of all sequences together, whose check is bound by memory."""
DRAWN = 1
"""The stream of uniforms that proposals are drawn with."""


class Proposer(ABC):
    """What `Draft`, `Ngram` and `Padded` share: the choice of k, the room it needs, the costs measured so far."""

    only = AUTOMATIC[-1]
    """The one k that is tried where the shape of its check is compiled for it."""
    blind = False
    """Whether its proposals are only there to fill the shape."""

    def __init__(self, k: int | None, most: int, aligned: bool = False):
        """`k` None: chosen while generating, from 1 to `most`. `aligned`: a position's arithmetic is the same in every check."""
        k, most = None if k is None else whole("k", k), whole("most", most)
        for label, value in (("k", k), ("most", most)):
            if value is not None and value < 1:
                raise ValueError(f"{label}={value} must be at least 1: so many tokens are proposed in a round")
        aligned = flag("aligned", aligned)
        if aligned and k is None:
            raise ValueError("aligned checks need a fixed k")
        self.k, self.most, self.aligned = k, most, aligned
        self.compilations = Compilations()
        self._costs: dict[tuple[object, ...], Costs] = {}
        self._seen: weakref.WeakKeyDictionary[KVCache, set[object]] = weakref.WeakKeyDictionary()

    @property
    def slack(self) -> int:
        """Cache slots wanted beyond those of the request: a check writes k slots past the last token."""
        return self.k or self.most

    @property
    def held_bytes(self) -> int:
        """Memory of the proposer's weights and caches; none where it has no model."""
        return 0

    def read_bytes(self, statistics: Statistics) -> float:
        """Bytes of weights read for the proposals that were counted."""
        return 0.0

    def check(self, target: Runner, requests: Sequence[Request], capacity: int | None) -> int:
        """Positions that are left for proposals in rows of so many; ValueError, with the numbers, for what cannot be."""
        needed = max(request.positions for request in requests)
        self.fits(target, needed)
        room = (target.config.max_context if capacity is None else min(target.config.max_context, capacity)) - needed
        if self.k is not None and self.k > room:
            raise ValueError(
                f"k={self.k} is larger than the context left: {needed} positions are asked for, and {room} remain"
            )
        for request in requests:
            if request.logprobs is not None:
                raise ValueError("logprobs are not told with a draft: score() the text afterwards")
            request.sampling.check_without_history()
            if self.aligned and request.sampling.temperature and not self.blind:
                raise ValueError("aligned checks are for temperature 0: they promise bits, not a distribution")
        return room

    def begin(self, target: Runner, slots: Sequence[Row | None], cache: KVCache, length: int) -> Rounds:
        """The steps, by rounds, of rows of up to `length` positions, which come and go in these slots."""
        positions = length + self.slack
        source = self.source(target, len(slots), positions)
        settle = partial(self.settle, target)
        manner = Manner(settle, positions, self.compilations, self.k is not None, self.aligned)
        return Rounds(source, target, slots, cache, manner)

    def settle(self, target: Runner, requests: Sequence[Request], cache: KVCache, code: tuple[object, ...]) -> Terms:
        """How many tokens may be proposed while these requests run, in a cache of as many rows as a round has."""
        rows, compiler, on_gpu = cache.batch, target.plan.compiler, target.device.type == "cuda"
        room = self.check(target, requests, cache.capacity)
        if self.k is None and on_gpu:
            room = min(room, max(1, CHEAP_ROWS // rows - 1))
        ks = self.candidates(target, room)
        costs = self._costs.setdefault((rows, cache.capacity, code), Costs(agreement(target)))
        is_new = self.is_new(cache, code) and (compiler.compiles_each_shape or compiler.records_addresses)
        # up to eight rows cost a GPU the same, another shape costs kernels
        width = max(ks, default=0) + 1 if self.k is None and on_gpu else 1
        needed = max(request.positions for request in requests)
        notice = "" if ks else f"plain decoding: {needed} positions leave no room for proposals"
        return Terms(ks, width, costs, is_new, notice)

    def candidates(self, target: Runner, room: int) -> tuple[int, ...]:
        """The ks to choose from: one where each is compiled for."""
        if self.k is not None:
            return (self.k,)
        on_gpu = target.device.type == "cuda"
        single = target.plan.compiler.compiles_each_shape and not on_gpu
        possible = (min(self.only, self.most),) if single else AUTOMATIC
        return tuple(k for k in possible if k <= min(self.most, room))

    def is_new(self, cache: KVCache, kind: tuple[object, ...]) -> bool:
        """Whether no rounds of this kind have been in that cache; a compiler has then not seen their shapes."""
        known = self._seen.setdefault(cache, set())
        new = kind not in known
        known.add(kind)
        return new

    def fits(self, target: Runner, needed: int) -> None:  # noqa: B027 - most proposers serve any target
        """Raise ValueError where this proposer cannot serve that target for `needed` positions and its k beyond."""

    @abstractmethod
    def source(self, target: Runner, rows: int, positions: int) -> Source:
        """For so many slots of up to so many positions, proposals included."""


class Draft(Proposer):
    """A draft model: any runner with the target's vocabulary, a smaller model or the same one in fewer bits.

    It keeps its caches from one generation to the next, as compiled code wants them.
    """

    only = 3

    def __init__(self, runner: Runner, k: int | None = None, most: int = AUTOMATIC[-1], aligned: bool = False):
        super().__init__(k, most, aligned)
        self.runner = made("runner", runner, "a Runner, as build() makes one", "start", "step", "allocate")
        self.caches = Caches(runner)

    @property
    def held_bytes(self) -> int:
        return stored_bytes(self.runner.model) + self.caches.nbytes

    def read_bytes(self, statistics: Statistics) -> float:
        return float(statistics.proposed * weight_bytes_per_step(self.runner.model))

    def fits(self, target: Runner, needed: int) -> None:
        ours, theirs = self.runner.config, target.config
        if ours.vocab_size != theirs.vocab_size:
            raise ValueError(
                f"the draft has a vocabulary of {ours.vocab_size} tokens, the target one of {theirs.vocab_size}"
            )
        if self.runner.device != target.device:
            raise ValueError(f"the draft is on {self.runner.device}, the target on {target.device}")
        wanted = needed + (self.k or 0)
        if wanted > ours.max_context:
            raise ValueError(
                f"the draft's context of {ours.max_context} is shorter than the {wanted} positions asked for"
            )

    def candidates(self, target: Runner, room: int) -> tuple[int, ...]:
        return super().candidates(
            target, min(room, self.runner.config.max_context - (target.config.max_context - room))
        )

    def source(self, target: Runner, rows: int, positions: int) -> Source:
        return DraftSource(self.caches, rows, min(positions, self.runner.config.max_context), self.compilations)


class DraftSource:
    """Proposals of a model, token by token. The host waits for none of them."""

    blind = keeps_up = False
    runs_ahead = True

    def __init__(self, caches: Caches, rows: int, positions: int, compilations: Compilations):
        runner = caches.runner
        self.name = f"draft {runner.plan}"
        self.runner, self.caches, self.compilations = runner, caches, compilations
        self.slots, self.positions = rows, positions
        # The target's own transforms, so that q is like p.
        self.sampler = runner.prepared(BatchSampler.of_free_rows(rows, runner.device, 0), positions + 1)
        self.taken: KVCache | None = None

    @property
    def cache(self) -> KVCache:
        """Taken when rows come, and put back when none is left: others may propose in between."""
        if self.taken is None:
            self.taken = self.caches.take(self.slots, self.positions)
        return self.taken

    def guess(self, evidence: int) -> tuple[float, float]:
        return A_DRAFT

    def begin(self, first: int, requests: Sequence[Request]) -> list[tuple[int, int]]:
        self.sampler.set_rows(first, [request.sampling for request in requests])
        return [(0, NO_GUESS)] * len(requests)

    def read(self, state: State, first: int, width: int) -> None:
        """Prefill what stands before the newest token."""
        history_BL, position_B = state.history_BL[:, :width].contiguous(), state.position_B.clone()
        rows = len(position_B)
        self.runner.start(history_BL, position_B, part_of(self.cache, first, rows), self.runner.greedy(rows))

    def propose(self, state: State, k: int, behind: bool) -> tuple[Tensor, Tensor | None]:
        # After full acceptance the last proposal was never fed to the draft: its first step takes two tokens. So it does where
        # the round before is under way still, and may have been accepted in full.
        rows = len(state.position_B)
        cache = self.cache if rows == self.slots else self.cache.rows(0, rows)
        greedy = self.runner.greedy(rows)
        choose = self.sampler if rows == self.slots else self.sampler.rows(0, rows)
        token_BN, at_B = state.newest(2 if behind else 1), state.position_B - int(behind)
        tokens, distributions = [], []
        if not choose.greedy:
            pick_one = self.compilations.of(pick, self.runner, rows, choose.code)
            ahead_K = torch.arange(1, k + 1, device=at_B.device)
            u_BK = choose.uniforms(state.position_B[:, None] + ahead_K, torch.full_like(ahead_K, DRAWN))
        for i in range(k):
            token_B, logits_BTV = self.runner.step(token_BN, at_B, cache, greedy)
            at_B = state.position_B + (i + 1)
            if choose.greedy:
                token_B = token_B.clone()  # a CUDA graph overwrites its outputs at the next replay
            else:
                token_B, p_BV = pick_one(choose, logits_BTV[:, -1].clone(), u_BK[:, i].clone())
                distributions.append(p_BV)
            tokens.append(token_B)
            token_BN = token_B[:, None]
        return torch.stack(tokens, 1), torch.stack(distributions, 1) if distributions else None

    def look(self, slot: int, tokens: Sequence[int]) -> tuple[int, int]:
        return 0, NO_GUESS

    def leave(self, slot: int) -> None:
        self.sampler.free_row(slot)

    def narrow(self) -> None:
        self.sampler.narrow()

    def finish(self) -> None:
        if self.taken is not None:
            self.caches.put_back(self.taken)
        self.taken = None


def pick(choose: BatchSampler, logits_BV: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
    """The token proposed, and the distribution [B, V] it was drawn from: one for both, to the last bit."""
    p_BV = choose.probabilities(logits_BV)
    return choose.draw(p_BV, u_B), p_BV


class Ngram(Proposer):
    """Prompt lookup: what followed the last few tokens when they stood here before. No model, next to no cost."""

    def __init__(
        self,
        k: int | None = None,
        most: int = AUTOMATIC[-1],
        longest: int = 4,
        shortest: int = 2,
        aligned: bool = False,
    ):
        """Looks for the last `longest` tokens, then for fewer, down to `shortest`; of equal matches the latest counts."""
        super().__init__(k, most, aligned)
        longest, shortest = whole("longest", longest), whole("shortest", shortest)
        if not 1 <= shortest <= longest:
            raise ValueError(f"an n-gram of {shortest} to {longest} tokens is none: 1 <= shortest <= longest")
        self.longest, self.shortest = longest, shortest

    def source(self, target: Runner, rows: int, positions: int) -> Source:
        return NgramSource(rows, self.longest, self.shortest)


class NgramSource:
    """Proposals by the host, from the tokens that it reads in any case."""

    blind, keeps_up, runs_ahead = False, True, False

    def __init__(self, rows: int, longest: int, shortest: int):
        self.name = f"n-gram, {shortest} to {longest} tokens"
        self.longest, self.shortest = longest, shortest
        self.texts = [Text(shortest, longest) for _ in range(rows)]

    def guess(self, evidence: int) -> tuple[float, float]:
        """A short match says little: in prose one token in three after it is as before, in code two."""
        return (0.9 if evidence >= self.longest else 0.5), 3.0

    def begin(self, first: int, requests: Sequence[Request]) -> list[tuple[int, int]]:
        for slot, _ in enumerate(requests, first):
            self.leave(slot)
        return [self.look(slot, request.ids) for slot, request in enumerate(requests, first)]

    def read(self, state: State, first: int, width: int) -> None:
        """What it was told is all it reads."""

    def propose(self, state: State, k: int, behind: bool) -> tuple[Tensor, Tensor | None]:
        rows, device = len(state.position_B), state.position_B.device
        found_BK = torch.tensor([text.following(k) for text in self.texts[:rows]])
        if device.type == "cuda":  # from pinned memory the copy takes its turn on the device, and the host goes on
            found_BK = found_BK.pin_memory()
        return found_BK.to(device, non_blocking=True), None

    def look(self, slot: int, tokens: Sequence[int]) -> tuple[int, int]:
        text = self.texts[slot]
        text.extend(tokens)
        return text.match()[0] or -1, text.following(1)[0]

    def leave(self, slot: int) -> None:
        self.texts[slot] = Text(self.shortest, self.longest)

    def narrow(self) -> None:
        """What it knows of a slot went with the row."""

    def finish(self) -> None:
        """It holds nothing that others could use."""


class Padded(Proposer):
    """Plain decoding through aligned checks of k tokens: what speculation with these equals bit for bit."""

    blind = True

    def __init__(self, k: int):
        super().__init__(whole("k", k), whole("k", k), aligned=True)

    def source(self, target: Runner, rows: int, positions: int) -> Source:
        return PaddedSource()


class PaddedSource:
    """Rows that are there for their number alone."""

    name = "none, padded"
    blind = keeps_up = runs_ahead = True

    def guess(self, evidence: int) -> tuple[float, float]:
        return A_DRAFT

    def begin(self, first: int, requests: Sequence[Request]) -> list[tuple[int, int]]:
        return [(0, NO_GUESS)] * len(requests)

    def read(self, state: State, first: int, width: int) -> None:
        """Nothing is to be known."""

    def propose(self, state: State, k: int, behind: bool) -> tuple[Tensor, Tensor | None]:
        return torch.zeros_like(state.position_B)[:, None].expand(-1, k).contiguous(), None

    def look(self, slot: int, tokens: Sequence[int]) -> tuple[int, int]:
        return 0, NO_GUESS

    def leave(self, slot: int) -> None:
        """Nothing is known of it."""

    def narrow(self) -> None:
        """Nothing is known."""

    def finish(self) -> None:
        """It holds nothing."""

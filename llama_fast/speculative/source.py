"""What rounds ask of a source of proposals: a draft model, a lookup in what was written, or nobody.

A source knows the rows by their slots, as the engine does. Shapes: B rows, K proposed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llama_fast.compilers.compilation import own_code
from llama_fast.engine.request import Request
from llama_fast.engine.runner import Runner
from llama_fast.speculative.adaptive_k import Costs
from llama_fast.speculative.verification import State

NO_GUESS = -1
NOTHING = (-1, NO_GUESS)
"""The evidence and the guess of a row for which there are no proposals."""


@dataclass(frozen=True)
class Terms:
    """What holds for the rows that run, from when one of them joins until the next one does."""

    ks: tuple[int, ...]
    """How many tokens a round may propose; a fixed k stands alone."""
    width: int
    """Tokens that a check has at least: where that is more than a round proposes, every check has one shape."""
    costs: Costs
    is_new: bool
    """Whether steps of these shapes have not run before in this cache."""
    notice: str = ""


class Source(Protocol):
    """Where the proposals come from."""

    name: str

    def guess(self, evidence: int) -> tuple[float, float]:
        """Of proposals with this evidence, before any was judged: their acceptance, and how many proposals that counts for."""

    @property
    def blind(self) -> bool:
        """Whether proposals are only there to fill the shape, and none is to stand."""

    @property
    def keeps_up(self) -> bool:
        """Whether it can propose again after plain steps without more ado."""

    @property
    def runs_ahead(self) -> bool:
        """Whether it proposes from what is on the device alone, before the round ahead has come to the host."""

    def begin(self, first: int, requests: Sequence[Request]) -> list[tuple[int, int]]:
        """The slots from the `first` on have these requests. Of each, what `look` tells, of its prompt alone."""

    def read(self, state: State, first: int, width: int) -> None:
        """Take in what was written so far in the slots from the `first` on, a row of `state` each.

        No row has more than `width` tokens before its newest.
        """

    def propose(self, state: State, k: int, behind: bool) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, k] for the first B slots, and the distributions [B, k, V] they were drawn from; None: they are certain.

        `behind`: the round before may have accepted all of some row's proposals, so that the token before the newest is not
        yet known to the source.
        """

    def look(self, slot: int, tokens: Sequence[int]) -> tuple[int, int]:
        """A row goes on with these tokens. The evidence of its next proposals, and the first of these.

        Evidence is at least 0, or -1 where there are none; the first is NO_GUESS where it is not known before proposals are
        asked for.
        """

    def leave(self, slot: int) -> None:
        """Nobody stands in this slot any more."""

    def narrow(self) -> None:
        """Some have left, and a step is to be launched."""

    def finish(self) -> None:
        """No row is left."""


class Compilations:
    """Small functions, compiled for fixed shapes where a runner's plan compiles its own; kept by their shapes. Beside a step of
    ready-made kernels they are short as they are, and would take longer to compile than all of them.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Callable[..., Any]] = {}

    def of(self, function: Callable[..., Any], runner: Runner, *shape: object) -> Callable[..., Any]:
        """`function`, or its compiled form for calls that are alike in `shape`."""
        if not runner.plan.compiler.compiles_each_shape:
            return function
        key = (function, *shape)
        if key not in self._known:
            self._known[key] = torch.compile(own_code(function), dynamic=False, fullgraph=True)
        return self._known[key]

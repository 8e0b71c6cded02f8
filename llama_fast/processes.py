"""How the processes of one model speak to each other, as a plan's shard offers it: sums over ranks, and stages in a line.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class AllReduce(Protocol):
    """How the partial results of all processes become one."""

    @property
    def alone(self) -> bool:
        """Whether there is one process, whose results are whole."""

    @property
    def exchange(self) -> Any:
        """The `kernels.exchange.Exchange` by which kernels reach the other processes themselves, or None."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The sum of x over all processes; with a residual, residual + sum in the residual's type."""


Answer = Callable[[], tuple[Tensor, Tensor]]
"""Waits for a pass that is under way: the next token [B] and the logits, as its phase gives them."""


class Line(Protocol):
    """How the stages of a model, one behind another, tell each other what they found. All make their calls in the same order."""

    @property
    def count(self) -> int:
        """How many stages there are."""

    @property
    def first(self) -> bool: ...

    @property
    def last(self) -> bool: ...

    def take(self, empty_BTD: Tensor) -> Tensor:
        """The hidden states that the stage before has given, written into this tensor."""

    def give(self, x_BTD: Tensor) -> None:
        """Send hidden states to the next stage, which takes them when it comes to them."""

    def tell(self, token_B: Tensor, logits: Tensor) -> Answer:
        """Of the last stage: send every other what it chose, and from what. Of the others: receive that into these tensors."""

"""What an engine knows of grammars: somebody says, before each token of a row, which tokens may come.

Shapes: W words of 32 tokens each.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from torch import Tensor


class Guide(Protocol):
    """One row's way through a grammar."""

    @property
    def complete(self) -> bool:
        """Whether the text is one of the grammar's, and nothing may follow."""

    @property
    def failure(self) -> str | None:
        """Why the row cannot go on, in one line; None while it can."""

    def allow(self, words_W: Tensor) -> None:
        """Write which tokens may come next into int32 words on the host, a bit for each, the lowest bit first."""

    def take(self, token: int) -> None:
        """The row goes on with this token."""


class Constraint(Protocol):
    """A grammar made ready for the tokens of a model."""

    @property
    def ends(self) -> Collection[int]:
        """The ids that may end a text that is complete."""

    def begin(self) -> Guide:
        """A row at its first token."""

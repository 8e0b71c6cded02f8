"""Who can be judged: anything that turns tokens into logits. What more a subject can do is asked of it if it offers it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Route = Callable[[Sequence[Sequence[int]], Sequence[int]], list[Tensor]]
"""Rows and splits -> logits [T_b - split_b + 1, V] for each row, as `decode_logits`, by another way."""

Trace = dict[str, Tensor]
"""What one row's stages showed: name -> [T, features], names as in the reference ("layers.3.q_rope")."""


class Subject(Protocol):
    """Logits for given tokens, by three routes that a fault can take. Rows may have different lengths.

    T_b is the length of row b, V the vocabulary's size.
    """

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of the arithmetic: it sets the yardstick. (Logits may come back in another.)"""

    def prefill_logits(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """[T_b, V] for each row, all positions at once."""

    def decode_logits(self, rows: Sequence[Sequence[int]], splits: Sequence[int]) -> list[Tensor]:
        """[T_b - split_b + 1, V] for each row, from position split_b - 1 on.

        The first split_b tokens are prefilled, in one ragged batch with the other rows; the rest is fed token by token
        through the cache.
        """

    def greedy(self, prompts: Sequence[Sequence[int]], n: int) -> list[tuple[list[int], Tensor]]:
        """n tokens after each prompt by the largest logit, never stopping, and the logits [n, V] they came from."""


@runtime_checkable
class ManyRoutes(Protocol):
    """A subject with more ways to the same logits: several tokens a step, a cache used before, rows one by one."""

    def routes(self) -> Mapping[str, tuple[Route, int]]:
        """By name: the way, and the number of a case's split that it is asked at."""


@dataclass(frozen=True)
class Setting:
    """How tokens are drawn: softmax(logits / temperature) restricted to the top k, then to the top p, then to those at least
    `min_p` times as likely as the likeliest."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __str__(self) -> str:
        least = f", min-p {self.min_p:g}" if self.min_p else ""
        return f"temperature {self.temperature:g}, top-k {self.top_k}, top-p {self.top_p:g}{least}"


@runtime_checkable
class Generates(Protocol):
    """A subject with a generation loop of its own: it can draw, and it can stop."""

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, setting: Setting, seed: int
    ) -> list[tuple[list[int], Tensor]]:
        """n drawn tokens after each prompt, and the logits [n, V] they came from."""

    def until(self, prompts: Sequence[Sequence[int]], n: int, eos_ids: Collection[int]) -> list[tuple[list[int], str]]:
        """At most n greedy tokens after each prompt, ended by one of `eos_ids` (kept); "stop" or "length"."""

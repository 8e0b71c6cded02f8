"""Who can be judged: anything that turns tokens into logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


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

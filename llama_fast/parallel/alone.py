"""One process holds everything, and its sums are done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from llama_fast.processes import AllReduce
from llama_ref.config import LlamaConfig


class Alone:
    """The sum over one process."""

    alone = True
    exchange = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return x if residual is None else (residual + x).type_as(residual)


@dataclass(frozen=True)
class Whole:
    """One process holds everything."""

    all_reduce: AllReduce = field(default_factory=Alone, init=False, repr=False, compare=False)

    def __str__(self) -> str:
        return "whole"

    def local_config(self, config: LlamaConfig) -> LlamaConfig:
        return config

    def part(self, name: str, shape: Sequence[int], config: LlamaConfig) -> tuple[slice, ...]:
        return (slice(None),) * len(shape)

    def head(self, linear: nn.Module, vocab_size: int) -> nn.Module:
        return linear

    @property
    def everyone(self) -> AllReduce:
        return self.all_reduce

    line: ClassVar[None] = None
    ends: ClassVar[tuple[bool, bool]] = (True, True)

    def layers(self, config: LlamaConfig) -> range:
        return range(config.n_layers)

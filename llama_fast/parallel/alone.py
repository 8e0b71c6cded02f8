"""One process holds everything, and its sums are done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from llama_fast.contracts import AllReduce
from llama_ref.config import LlamaConfig


class Alone:
    """The sum over one process."""

    alone = True

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def add_product(self, a: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor) -> Tensor:
        from llama_fast.kernels import ops  # lazy import: Triton is optional

        return ops.linear_add(a, weight, scale, residual)

    def in_kernels(self, rows: int, dim: int, vocab_size: int) -> bool:
        return True


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

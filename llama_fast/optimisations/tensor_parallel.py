"""Tensor parallelism: every matrix is cut over processes, so that one token's bytes are read by all of them at once.
The model does not change; it sums what the processes computed, after attention and after the feed-forward.

q, k, v, gate and up are cut by rows (heads, hidden units), `wo` and `w2` by the matching columns, so that nothing needs
to be sent in between. The output head is cut by rows, over the vocabulary, and every process gets all logits: it draws the
same token as the others without asking. The embedding table stays whole, since a token reads one row of it. With fewer
key/value heads than processes, neighbours hold the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.model import SplitHead
from llama_fast.plan import AllReduce
from llama_ref.config import LlamaConfig

BY_QUERY_HEADS = "attention.wq"
BY_KEY_HEADS = ("attention.wk", "attention.wv")
BY_ROWS = ("feed_forward.w1", "feed_forward.w3", "output")
BY_COLUMNS = ("attention.wo", "feed_forward.w2")


class OverGroup:
    """The sum over the default process group by a functional collective, which compilers and CUDA graphs capture."""

    def __call__(self, x: Tensor) -> Tensor:
        group: Any = dist.group.WORLD
        total: Tensor = functional.wait_tensor(functional.all_reduce(x, "sum", group))
        return total

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return (residual + self(x)).type_as(residual)


@dataclass(frozen=True)
class Gather:
    """Parts of the last axis to the whole: a sum of parts padded with zeros, which is exact and the same everywhere."""

    before: int
    after: int
    all_reduce: AllReduce

    def __call__(self, part: Tensor) -> Tensor:
        return self.all_reduce(F.pad(part, (self.before, self.after)))


@dataclass(frozen=True)
class TensorParallel:
    """Process `rank` of `size`. Summing needs the default process group, cutting does not."""

    rank: int
    size: int
    all_reduce: AllReduce = field(default_factory=OverGroup, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank} is none of {self.size} ranks")

    def __str__(self) -> str:
        return f"tensor parallel over {self.size}"

    def local_config(self, config: LlamaConfig) -> LlamaConfig:
        """This process's heads and hidden width; the vocabulary's size stays that of all logits."""
        self._check("n_heads", config.n_heads)
        self._check("ffn_dim", config.ffn_dim)
        if self.size % config.n_kv_heads:  # else each is held by size / n_kv_heads neighbours
            self._check("n_kv_heads", config.n_kv_heads)
        return replace(
            config,
            n_heads=config.n_heads // self.size,
            n_kv_heads=max(1, config.n_kv_heads // self.size),
            ffn_dim=config.ffn_dim // self.size,
        )

    def part(self, name: str, shape: Sequence[int], config: LlamaConfig) -> tuple[slice, ...]:
        """The slices of a weight, by the last two words of its name; `config` is the whole model's."""
        everything = (slice(None),) * len(shape)
        role = ".".join(name.split(".")[-2:])
        if role in BY_COLUMNS:
            return (*everything[:-1], self._share(shape[-1]))
        if role in BY_KEY_HEADS:
            return (self._key_heads(shape[0], config.n_kv_heads), *everything[1:])
        if role == BY_QUERY_HEADS or role in BY_ROWS:
            return (self._share(shape[0]), *everything[1:])
        return everything

    def head(self, linear: nn.Module, vocab_size: int) -> nn.Module:
        """`linear` gives the logits of this process's rows of the vocabulary; the module gives all of them."""
        held = self._share(vocab_size)
        return SplitHead(linear, Gather(held.start, vocab_size - held.stop, self.all_reduce))

    def _share(self, count: int) -> slice:
        """Neighbouring entries; where they do not divide (a vocabulary), some processes hold one more."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def _key_heads(self, rows: int, n_kv_heads: int) -> slice:
        if n_kv_heads >= self.size:
            return self._share(rows)
        head, width = self.rank * n_kv_heads // self.size, rows // n_kv_heads
        return slice(head * width, (head + 1) * width)

    def _check(self, what: str, count: int) -> None:
        if count % self.size:
            raise ValueError(f"{what}={count} does not divide over {self.size} ranks")

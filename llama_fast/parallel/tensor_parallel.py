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
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.model.matrices import SplitHead
from llama_fast.processes import AllReduce
from llama_ref.arguments import whole
from llama_ref.config import LlamaConfig

if TYPE_CHECKING:
    from llama_fast.kernels.exchange import Exchange

BY_QUERY_HEADS = "attention.wq"
BY_KEY_HEADS = ("attention.wk", "attention.wv")
BY_ROWS = ("feed_forward.w1", "feed_forward.w3", "output")
BY_COLUMNS = ("attention.wo", "feed_forward.w2")


class Exchanger(AllReduce, Protocol):
    """All that processes say to each other."""

    def gather(self, part: Tensor, first: int, columns: int) -> Tensor:
        """All `columns` of the last axis, of which this process has those from `first` on."""


class OverGroup:
    """Sums over a process group by functional collectives, which compilers and CUDA graphs capture."""

    alone = False
    exchange: Exchange | None = None
    group: Any = None

    def __init__(self, group: Any = None):
        """`group`: by default that of all processes."""
        self.group = group

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        total = self.total(x)
        return total if residual is None else (residual + total).type_as(residual)

    def total(self, x: Tensor) -> Tensor:
        group: Any = self.group or dist.group.WORLD
        return functional.wait_tensor(functional.all_reduce(x, "sum", group))  # type: ignore[no-any-return]

    def gather(self, part: Tensor, first: int, columns: int) -> Tensor:
        # a sum of parts padded with zeros is exact, takes uneven parts, and is the same everywhere
        return self(F.pad(part, (first, columns - first - part.shape[-1])))


class OverNvlink(OverGroup):
    """What one decode step says goes straight into the other GPUs' memory; longer messages go by the group."""

    def __init__(self, exchange: Exchange, group: Any = None):
        super().__init__(group)
        from llama_fast.kernels.exchange import opened  # lazy import: Triton is optional

        self.exchange: Exchange = exchange
        self.name = opened(exchange)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.numel() > self.exchange.mailbox.words:
            return super().__call__(x, residual)
        return torch.ops.llama_fast.exchange_sum(x, residual, self.name)  # type: ignore[no-any-return]

    def gather(self, part: Tensor, first: int, columns: int) -> Tensor:
        rows = part.numel() // part.shape[-1]
        if not self.exchange.takes(rows, columns):
            return super().gather(part, first, columns)
        whole: Tensor = torch.ops.llama_fast.exchange_gather(part.reshape(rows, -1), columns, self.name)
        return whole.view(*part.shape[:-1], columns)


class OverSymmetricMemory(OverGroup):
    """PyTorch's own one-shot sum, for messages of up to `most_bytes`. Multicast plays no part in it."""

    def __init__(self, buffer: Tensor, most_bytes: int, group: Any = None):
        """`buffer`: symmetric memory in which every process's x is laid down, at least `most_bytes` long."""
        super().__init__(group)
        self.buffer = buffer
        self.most_bytes = most_bytes

    def total(self, x: Tensor) -> Tensor:
        if x.nbytes > self.most_bytes or x.nbytes % 16:
            return super().total(x)
        group: Any = self.group or dist.group.WORLD
        laid_down = self.buffer.view(x.dtype)[: x.numel()].view(x.shape)
        laid_down.copy_(x)
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(laid_down, "sum", group.group_name)
        return total


@dataclass(frozen=True)
class Gather:
    """Logits of all processes, of which this one has those from `first` on."""

    first: int
    columns: int
    exchanger: Exchanger

    def __call__(self, part: Tensor) -> Tensor:
        return self.exchanger.gather(part, self.first, self.columns)


@dataclass(frozen=True)
class TensorParallel:
    """Process `rank` of `size`. Summing needs a process group, cutting does not."""

    rank: int
    size: int
    all_reduce: Exchanger = field(default_factory=OverGroup, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("rank", "size"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank} is none of {self.size} ranks")

    line: ClassVar[None] = None
    ends: ClassVar[tuple[bool, bool]] = (True, True)

    def __str__(self) -> str:
        return f"tensor parallel over {self.size}"

    @property
    def everyone(self) -> Exchanger:
        return self.all_reduce

    def layers(self, config: LlamaConfig) -> range:
        return range(config.n_layers)

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
        return SplitHead(linear, Gather(self._share(vocab_size).start, vocab_size, self.all_reduce))

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

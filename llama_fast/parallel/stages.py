"""Pipeline stages: neighbouring layers stand on processes of their own, and hidden states go from one stage to the next.

Unlike a tensor-parallel rank, a stage holds whole layers, of which `within` may again cut every matrix over some processes. The
first stage embeds, the last has the norm and the head; it tells all others the tokens and their logits, so that every process
goes on with the same ones. One text is not faster for it: stages work one after another. Several groups of rows are: each stage
works on another.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_fast.contracts import Shard
from llama_fast.parallel.alone import Alone, Whole
from llama_fast.processes import AllReduce, Answer, Line
from llama_ref.arguments import whole
from llama_ref.config import LlamaConfig

AHEAD = 16
"""Messages that may be under way to a stage that has not taken them."""


class OverGroups:
    """A line of `count` stages over process groups: hidden states in pairs of neighbours, answers to all stages at once.

    Each pair has a group of its own, because NCCL does what it is asked of one group in turn.
    """

    def __init__(self, index: int, count: int, column: Any, pairs: Sequence[Any]):
        """`column`: the group of the processes in this place of every stage; `pairs[i]`: of those in the stages i and i + 1."""
        self.index, self.count = index, count
        self._column, self._pairs = column, pairs
        self._under_way: deque[tuple[Any, Tensor]] = deque()

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1

    def take(self, empty_BTD: Tensor) -> Tensor:
        dist.irecv(empty_BTD, group=self._pairs[self.index - 1], group_src=0).wait()  # type: ignore[union-attr]
        return empty_BTD

    def give(self, x_BTD: Tensor) -> None:
        x_BTD = x_BTD.clone(memory_format=torch.contiguous_format)  # the next pass may write over it
        self._keep(dist.isend(x_BTD, group=self._pairs[self.index], group_dst=1), x_BTD)

    def tell(self, token_B: Tensor, logits: Tensor) -> Answer:
        if self.last and token_B.is_cuda:  # a recorded step writes over what it gave
            token_B, logits = token_B.clone(), logits.clone()
        token_B, logits = token_B.contiguous(), logits.contiguous()
        works = [
            dist.broadcast(tensor, group_src=self.count - 1, group=self._column, async_op=True)
            for tensor in (token_B, logits)
        ]

        def answer() -> tuple[Tensor, Tensor]:
            while works:
                works.pop(0).wait()
            return token_B, logits

        if not self.last:
            return answer
        for work, tensor in zip(works, (token_B, logits), strict=True):
            self._keep(work, tensor)
        return lambda: (token_B, logits)

    def _keep(self, work: Any, tensor: Tensor) -> None:
        """Hold on to a message until it has arrived."""
        self._under_way.append((work, tensor))
        while len(self._under_way) > AHEAD:
            self._under_way.popleft()[0].wait()


@dataclass(frozen=True)
class Stages:
    """Stage `index` of `count`; `within`: what this process holds of the stage. Running needs a `line`, cutting does not."""

    index: int
    count: int
    within: Shard = field(default_factory=Whole)
    line: Line | None = field(default=None, repr=False, compare=False)
    everyone: AllReduce = field(default_factory=Alone, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("index", "count"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        if not 0 <= self.index < self.count:
            raise ValueError(f"index={self.index} is none of {self.count} stages")

    def __str__(self) -> str:
        stages = f"{self.count} stages"
        return stages if self.within == Whole() else f"{self.within} in {stages}"

    @property
    def all_reduce(self) -> AllReduce:
        return self.within.all_reduce

    def local_config(self, config: LlamaConfig) -> LlamaConfig:
        """The stage's layers, and of these the shapes of this process's part."""
        local = self.within.local_config(config)
        return replace(local, n_layers=len(self.layers(config)))

    def layers(self, config: LlamaConfig) -> range:
        """Neighbouring layers, so that every stage reads about as much for a token; the head counts as what it reads."""
        if config.n_layers < self.count:
            raise ValueError(f"n_layers={config.n_layers} are too few for {self.count} stages")
        # wq, wo, wk, wv; w1, w2, w3
        of_layer = config.dim * (2 * config.head_dim * (config.n_heads + config.n_kv_heads) + 3 * config.ffn_dim)
        read = config.n_layers + config.vocab_size * config.dim / of_layer

        def begin(stage: int) -> int:
            even = round(read * stage / self.count)
            return max(stage, min(even, config.n_layers - (self.count - stage)))

        return range(begin(self.index), config.n_layers if self.index == self.count - 1 else begin(self.index + 1))

    @property
    def ends(self) -> tuple[bool, bool]:
        return self.index == 0, self.index == self.count - 1

    def part(self, name: str, shape: Sequence[int], config: LlamaConfig) -> tuple[slice, ...]:
        """As the tensor's stage is cut; nothing of a tensor of another stage."""
        if not self._holds(name, config):
            return (slice(0, 0), *(slice(None),) * (len(shape) - 1))
        tied_head = name == "tok_embeddings" and self.index > 0  # nobody looks up a row of it here
        return self.within.part("output" if tied_head else name, shape, config)

    def head(self, linear: nn.Module, vocab_size: int) -> nn.Module:
        return self.within.head(linear, vocab_size)

    def _holds(self, name: str, config: LlamaConfig) -> bool:
        first, last = self.ends
        if name == "tok_embeddings":
            return first or (last and config.tie_embeddings)
        if name.startswith("layers."):
            return int(name.split(".")[1]) in self.layers(config)
        return last

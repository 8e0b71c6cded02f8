"""Steps recorded once as CUDA graphs, and replayed: the host launches one thing a token, whichever arithmetic it is.

Decode, and the check of a few proposed tokens, are such steps; a short prompt or continuation is one too, padded to one of few
widths. Longer ones are launched as they are written: they are bound by arithmetic, and each length would be recorded anew.
A recording holds addresses: the prompts of an engine's slots are recorded once for all in a cache of pages, whose rows are read
by way of one table, and once for each slot in a static one.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.choosing import Sampler, SamplingKernels
from llama_fast.contracts import KVCache, Phase
from llama_fast.model.llama import Llama
from llama_fast.model.roofline import stored_bytes

FEWEST_ROWS, MOST_ROWS = 8, 128
"""Tokens of all prompts together, padded, that are recorded."""
FEW_TOKENS, MOST_ROWS_OF_FEW = 8, 1024
"""The same where each prompt has so few: there are few such widths."""
SOME_BLOCKS = 8
"""Blocks of a pass in which tiles are timed."""


@dataclass(frozen=True)
class Graphed:
    """Recorded steps. Needs a CUDA device and a cache whose addresses stay."""

    records_addresses: ClassVar[bool] = True
    compiles_each_shape: ClassVar[bool] = False

    def compile(self, prefill: Phase, decode: Phase, model: nn.Module) -> tuple[Phase, Phase]:
        """Raises ValueError where there are no CUDA graphs."""
        assert isinstance(model, Llama)
        if model.rope_table.device.type != "cuda":
            raise ValueError("CUDA graphs need a CUDA device; on a CPU take Compiled()")
        return recorded_phases(prefill, decode, model)


def recorded_phases(prefill: Phase, decode: Phase, model: Llama) -> tuple[Phase, Phase]:
    """The two phases by way of recordings."""
    choose_likeliest = Likeliest(model.operations.sampling_kernels)

    def prompt(
        model: Llama, cache: KVCache, tokens_BT: Tensor, lengths_B: Tensor, start_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return prefill(model, tokens_BT, (start_B, lengths_B), cache, choose_likeliest)

    def one_step(model: Llama, cache: KVCache, tokens_BT: Tensor, start_B: Tensor) -> tuple[Tensor, Tensor]:
        return decode(model, tokens_BT, start_B, cache, choose_likeliest)

    prompts, steps = Recordings(model, prompt), Recordings(model, one_step)
    longest = model.config.max_context

    def graphed_prefill(
        unused: nn.Module,
        tokens_BT: Tensor,
        where: tuple[Tensor | None, Tensor | None],
        cache: KVCache,
        choose: Sampler,
    ) -> tuple[Tensor, Tensor]:
        start_B, lengths_B = where
        width = padded_width(*tokens_BT.shape[:2])
        if lengths_B is None or width is None or end_of(start_B, width) > min(cache.length, longest):
            return prefill(model, tokens_BT, where, cache, choose)
        T = tokens_BT.shape[1]
        padded_BT = F.pad(tokens_BT, (0, 0) * (tokens_BT.ndim - 2) + (0, width - T))
        behind = () if start_B is None else (start_B,)

        def steps_to_come(some: Llama) -> None:
            """What follows a prompt, anywhere in it: what this writes, the prompt writes over."""
            at_B = torch.zeros_like(lengths_B) if start_B is None else start_B
            _, logits_BTV = one_step(some, cache, tokens_BT[:, :1], at_B)
            if not choose.greedy:
                choose(torch.zeros_like(logits_BTV[:, -1]), at_B + 1)

        token_B, logits_BV = prompts(cache, padded_BT, lengths_B, *behind, to_come=steps_to_come)
        if model.head is None:  # hidden states of all tokens
            return token_B[:, :T], logits_BV[:, :T]
        if not choose.greedy:
            token_B = choose(logits_BV, lengths_B if start_B is None else start_B + lengths_B)
        return token_B, logits_BV

    def graphed_decode(
        unused: nn.Module, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: Sampler
    ) -> tuple[Tensor, Tensor]:
        token_B, logits_BTV = steps(cache, tokens_BT, start_B)
        if not choose.greedy:
            token_B = choose(logits_BTV[:, -1], start_B + tokens_BT.shape[1])
        return token_B, logits_BTV

    return graphed_prefill, graphed_decode


def end_of(start_B: Tensor | None, width: int) -> int:
    """Positions up to the last that is written. The host waits for `start_B`: it has just read the turn before."""
    return width if start_B is None else int(start_B.max()) + width


def padded_width(B: int, T: int) -> int | None:
    """Tokens a row that a prompt is padded to, or None if it is too long: (1, 3) -> 8, (1, 20) -> 32, (4, 3) -> 4."""
    width = max(1 << (T - 1).bit_length(), FEWEST_ROWS // B)
    return width if B * width <= (MOST_ROWS_OF_FEW if width <= FEW_TOKENS else MOST_ROWS) else None


@dataclass(frozen=True)
class Likeliest:
    """The sampler that a recording holds: the largest logit."""

    kernels: SamplingKernels | None
    greedy: ClassVar[bool] = True
    code: ClassVar[tuple[object, ...]] = ()

    def __call__(self, logits_BV: Tensor, position_B: Tensor) -> Tensor:
        return logits_BV.argmax(-1) if self.kernels is None else self.kernels.likeliest(logits_BV)


Shapes = tuple[torch.Size, ...]


@dataclass(frozen=True)
class Recorded:
    """A CUDA graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    results: tuple[Tensor, Tensor]


class Recordings:
    """A function of a model, a cache and tensors: run once as it is, which compiles its kernels, then recorded, then replayed.

    A graph belongs to a cache (it holds the cache's addresses) and to the shapes of the tensors, the first of them the tokens
    [B, T] or hidden states [B, T, D], and is dropped with the cache. What a call returns is overwritten by the next one of its
    shapes.
    """

    def __init__(self, model: Llama, function: Callable[..., tuple[Tensor, Tensor]]):
        self.model, self.function = model, function
        self.known: weakref.WeakKeyDictionary[KVCache, dict[Shapes, Recorded]] = weakref.WeakKeyDictionary()

    def __call__(
        self, cache: KVCache, *inputs: Tensor, to_come: Callable[[Llama], None] = lambda some: None
    ) -> tuple[Tensor, Tensor]:
        """The likeliest next token [B] and the logits, float32.

        What `to_come` runs, with one of the model's blocks, is compiled beside the function, before the first call of its shapes.
        """
        known, shapes = self.known.setdefault(cache, {}), tuple(tensor.shape for tensor in inputs)
        if shapes not in known:
            one_block = first_block_of(self.model)

            def first_launches() -> None:
                self.function(one_block, cache, *inputs)
                to_come(one_block)

            self.model.operations.compile_ahead(first_launches, shapes[0][:2].numel())
            self.choose_tiles(cache, inputs)
            results = self.function(self.model, cache, *inputs)
            known[shapes] = self.record(cache, inputs)
            return results
        recorded = known[shapes]
        for held, new in zip(recorded.inputs, inputs, strict=True):
            held.copy_(new)
        recorded.graph.replay()
        return recorded.results

    def choose_tiles(self, cache: KVCache, inputs: tuple[Tensor, ...]) -> None:
        some = with_blocks(self.model, self.model.blocks[:: -(-len(self.model.blocks) // SOME_BLOCKS)])
        rows, weight_bytes = inputs[0].shape[:2].numel(), stored_bytes(self.model)
        self.model.operations.choose_tiles(lambda: self.function(some, cache, *inputs), rows, weight_bytes)

    def record(self, cache: KVCache, inputs: tuple[Tensor, ...]) -> Recorded:
        inputs = tuple(tensor.clone() for tensor in inputs)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a process group's watchdog has its own thread
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = self.function(self.model, cache, *inputs)
        return Recorded(graph, inputs, results)


def first_block_of(model: Llama) -> Llama:
    """The same modules with one block: all that a step of equal blocks has to compile."""
    return with_blocks(model, model.blocks[:1])


def with_blocks(model: Llama, blocks: Iterable[nn.Module]) -> Llama:
    """The same modules with some of the blocks."""
    shell = copy.copy(model)
    shell._modules = {**model._modules, "blocks": nn.ModuleList(blocks)}
    return shell

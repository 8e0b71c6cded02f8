"""A decode step recorded once as a CUDA graph, and replayed: the host launches one thing a token, whichever arithmetic it is.

Decode, and the check of a few proposed tokens, are such steps; a short prompt is one too, padded to a fixed width. A longer
prompt, or a text's continuation, is launched as it is written: it is bound by arithmetic, and each length would be recorded anew.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.contracts import KVCache, Phase, Sampler, SamplingKernels
from llama_fast.model.llama import Llama

SHORT_PROMPT_ROWS = 8
"""Tokens of all prompts together that are prefilled by the graph of a step."""


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
        step = RecordedStep(model, decode)

        def graphed_prefill(
            unused: nn.Module,
            tokens_BT: Tensor,
            where: tuple[Tensor | None, Tensor],
            cache: KVCache,
            choose: Sampler,
        ) -> tuple[Tensor, Tensor]:
            (B, T), (start_B, lengths_B) = tokens_BT.shape, where
            width = SHORT_PROMPT_ROWS // B  # every short prompt is padded to one width: one graph serves them all
            if start_B is not None or width < T or cache.length < width:
                return prefill(model, tokens_BT, where, cache, choose)
            logits_BTV = step(F.pad(tokens_BT, (0, width - T)), torch.zeros_like(lengths_B), cache)[1]
            logits_BV = logits_BTV[torch.arange(B, device=lengths_B.device), lengths_B - 1]
            return choose(logits_BV, lengths_B), logits_BV

        def graphed_decode(
            unused: nn.Module, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: Sampler
        ) -> tuple[Tensor, Tensor]:
            T = tokens_BT.shape[1]
            token_B, logits_BTV = step(tokens_BT, start_B, cache)
            if not (choose.greedy and T == 1):
                token_B = choose(logits_BTV[:, -1], start_B + T)
            return token_B, logits_BTV

        return graphed_prefill, graphed_decode


@dataclass(frozen=True)
class Recorded:
    """A CUDA graph of one step, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    tokens_BT: Tensor
    start_B: Tensor
    token_B: Tensor
    logits_BTV: Tensor


@dataclass(frozen=True)
class Likeliest:
    """The sampler that a recording holds: the largest logit."""

    kernels: SamplingKernels | None
    greedy: ClassVar[bool] = True
    code: ClassVar[tuple[object, ...]] = ()

    def __call__(self, logits_BV: Tensor, position_B: Tensor) -> Tensor:
        return logits_BV.argmax(-1) if self.kernels is None else self.kernels.likeliest(logits_BV)


class RecordedStep:
    """One step of a model: run once as it is, which compiles its kernels, then recorded, then replayed.

    A graph belongs to a cache (it holds the cache's addresses) and to a shape (B, T), and is dropped with the cache.
    What a step returns is overwritten by the next one.
    """

    def __init__(self, model: Llama, decode: Phase):
        self.model, self.decode = model, decode
        self.choose = Likeliest(model.operations.sampling_kernels)
        self.recorded: weakref.WeakKeyDictionary[KVCache, dict[tuple[int, int], Recorded]] = weakref.WeakKeyDictionary()

    def __call__(self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """The likeliest next token [B] and the logits [B, T, V], float32."""
        B, T = tokens_BT.shape
        shapes = self.recorded.setdefault(cache, {})
        if (B, T) not in shapes:
            one_block = first_block_of(self.model)
            self.model.operations.compile_ahead(
                lambda: self.decode(one_block, tokens_BT, start_B, cache, self.choose), B * T
            )
            result = self.decode(self.model, tokens_BT, start_B, cache, self.choose)
            shapes[B, T] = self.record(tokens_BT, start_B, cache)
            return result
        recorded = shapes[B, T]
        recorded.tokens_BT.copy_(tokens_BT)
        recorded.start_B.copy_(start_B)
        recorded.graph.replay()
        return recorded.token_B, recorded.logits_BTV

    def record(self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache) -> Recorded:
        tokens_BT, start_B = tokens_BT.clone(), start_B.clone()
        graph = torch.cuda.CUDAGraph()
        # thread_local: a process group's watchdog has its own thread
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            token_B, logits_BTV = self.decode(self.model, tokens_BT, start_B, cache, self.choose)
        return Recorded(graph, tokens_BT, start_B, token_B, logits_BTV)


def first_block_of(model: Llama) -> Llama:
    """The same modules with one block: all that a step of equal blocks has to compile."""
    shell = copy.copy(model)
    shell._modules = {**model._modules, "blocks": nn.ModuleList([model.blocks[0]])}
    return shell

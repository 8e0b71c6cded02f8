"""Compile the two phases. Eager PyTorch launches hundreds of small kernels a token and the host cannot keep up.

The source's recipe, and the default on a GPU: prefill compiled for any length, decode compiled for one shape and
replayed as a CUDA graph. On a CPU there is no launch to save and compiling thirty equal blocks takes minutes, so one
block is compiled, reused for every layer, and only in decode; prefill, which is bound by arithmetic, stays eager.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llama_fast.model import Llama

Phase = Callable[..., Any]


@dataclass(frozen=True)
class Compiled:
    """`regional` compiles one block for all layers, else the whole decode step; None chooses by the device."""

    regional: bool | None = None

    def compile(self, prefill: Phase, decode: Phase, model: nn.Module) -> tuple[Phase, Phase]:
        on_cpu = next(model.buffers()).device.type == "cpu"
        if self.regional if self.regional is not None else on_cpu:
            assert isinstance(model, Llama)
            by_block = compiled_by_block(model)
            return prefill, lambda _, *arguments: decode(by_block, *arguments)
        return (
            torch.compile(prefill, dynamic=True, fullgraph=True),
            torch.compile(decode, dynamic=False, fullgraph=True, mode="reduce-overhead"),
        )


def compiled_by_block(model: Llama) -> Llama:
    """The same modules, each block behind a compiled call; the first compilation serves them all."""
    blocks = [torch.compile(block, dynamic=False, fullgraph=True) for block in model.blocks]
    shell = Llama.__new__(Llama)
    nn.Module.__init__(shell)
    shell.config, shell.embedding, shell.norm, shell.head = model.config, model.embedding, model.norm, model.head
    shell.blocks = nn.ModuleList(blocks)
    shell.register_buffer("rope_table", model.rope_table, persistent=False)
    return shell

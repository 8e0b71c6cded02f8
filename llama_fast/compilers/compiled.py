"""Compile the two phases. Eager PyTorch launches hundreds of small kernels a token and the host cannot keep up.

The source's recipe: prefill compiled for any length, decode compiled for one shape and, on a GPU, replayed as a CUDA
graph. The equal blocks are regions of the graph that are compiled once for all. On a CPU prefill, which is bound by
arithmetic, stays eager.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llama_fast.choosing import Sampler
from llama_fast.compilers.compilation import own_code
from llama_fast.compilers.tuner_clock import steady_tuning
from llama_fast.contracts import KVCache, LayerCache, Phase
from llama_fast.model.llama import Llama
from llama_fast.step import Step
from llama_ref.arguments import flag

Options = dict[str, str | int | bool | Callable[..., Any]]

GPU_OPTIONS: Options = {
    "triton.cudagraphs": True,  # what mode="reduce-overhead" means
    # Only so does inductor write a matrix-vector kernel of its own: without it int8 weights are first copied to bf16.
    "coordinate_descent_tuning": True,
    # A product's input is stored before it is read N times: norm and SiLU would else be computed again for every output.
    "realize_acc_reads_threshold": 2,
    "realize_opcount_threshold": 8,
}


def about_the_request(guards: Sequence[Any]) -> list[bool]:
    """Which guards a step asks before it runs: those on its arguments and on PyTorch's state, not on the model and on code,
    which stay what they were. For a model of thirty blocks that leaves 166 of 5058, and a seventh of an int8 step.
    """
    arguments = {"tokens_BT", "start_B", "cache", "choose", ""}  # of `runner.decode`; what has no name is a state
    return [re.sub(r"^L\['(\w+)'\]", r"\1", guard.name).split(".")[0] in arguments for guard in guards]


CPU_OPTIONS: Options = {
    # Nothing is stored but sums, and what the model says is to be (`matvec.kept`): inductor's own guess would store the products
    # of a word's numbers before it sums them.
    "realize_acc_reads_threshold": 1 << 20,
    "realize_opcount_threshold": 1 << 20,
    "guard_filter_fn": about_the_request,
    "size_asserts": False,  # of what follows from the shapes asked
}


UNPACKING: Options = {
    # A number that is unpacked from several fields of a block stays in the loop that multiplies it: stored, it is four bytes.
    "realize_acc_reads_threshold": 64,
    "realize_reads_threshold": 64,
    "realize_opcount_threshold": 1000,
}


def options_for(model: nn.Module, on_gpu: bool) -> Options:
    """Inductor's options; on a CPU others where an encoding says that it `unpacks`: its products store their input themselves."""
    encodings = [getattr(module, "encoding", None) for module in model.modules()]
    unpacks = any(getattr(encoding, "unpacks", False) for encoding in encodings)
    return GPU_OPTIONS if on_gpu else CPU_OPTIONS | UNPACKING if unpacks else CPU_OPTIONS


@dataclass(frozen=True)
class Compiled:
    """The source's two phases. `regions`: one compilation for all blocks, else each by itself, in minutes."""

    regions: bool = True
    records_addresses: ClassVar[bool] = False
    compiles_each_shape: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", flag("regions", self.regions))

    def compile(self, prefill: Phase, decode: Phase, model: nn.Module) -> tuple[Phase, Phase]:
        """Raises ValueError where the plan's arithmetic is not one of PyTorch's operators."""
        from torch._inductor import inductor_prims  # noqa: F401 - knows what `matvec.sums_by_words` asks of a compiler

        assert isinstance(model, Llama)
        if not model.operations.compilable:
            raise ValueError("Compiled() compiles PyTorch's operators: with kernels, as Triton(), take Graphed()")
        on_gpu = next(model.buffers()).device.type == "cuda"
        shell = with_regions(model) if self.regions else model
        options = options_for(model, on_gpu)
        steps: dict[tuple[object, ...], Phase] = {}
        prefills: dict[tuple[object, ...], Phase] = {}
        marked: weakref.WeakSet[KVCache] = weakref.WeakSet()

        def compiled_prefill(
            unused: nn.Module,
            tokens_BT: Tensor,
            where: tuple[Tensor | None, Tensor | None],
            cache: KVCache,
            choose: Sampler,
        ) -> tuple[Tensor, Tensor]:
            code = (where[0] is None, where[1] is None, choose.code)
            if code not in prefills:
                prefills[code] = torch.compile(own_code(prefill), dynamic=True, fullgraph=True)
            return prefills[code](model, tokens_BT, where, cache, choose)

        def compiled_step(
            unused: nn.Module, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: Sampler
        ) -> tuple[Tensor, Tensor]:
            if cache not in marked:
                mark_addresses(cache)
                marked.add(cache)
            shape = (tokens_BT.shape, cache.length, choose.code)
            if shape not in steps:
                steps[shape] = torch.compile(own_code(decode), dynamic=False, fullgraph=True, options={**options})
                with steady_tuning(tokens_BT.device):
                    return steps[shape](shell, tokens_BT, start_B, cache, choose)
            return steps[shape](shell, tokens_BT, start_B, cache, choose)

        return compiled_prefill if on_gpu else prefill, compiled_step


def mark_addresses(cache: KVCache) -> None:
    """Say that a cache stays where it is: a mutated input that is not marked loses its CUDA graph without a word.

    Unguarded: a second cache of the same shape runs the same code.
    """
    for layer in cache.layers:
        for tensor in layer.tensors:
            torch._dynamo.mark_static_address(tensor, guard=False)


class Region(nn.Module):
    """A block whose code is compiled once for all blocks that are equal but for their numbers."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x_BTD: Tensor, layer: LayerCache, step: Step) -> Tensor:
        out_BTD: Tensor = self.region(x_BTD, layer, step.position_BT, step.mask_BTS, step.cos_sin_BTd2)
        return out_BTD

    @torch.compiler.nested_compile_region
    def region(
        self, x_BTD: Tensor, layer: LayerCache, position_BT: Tensor, mask_BTS: Tensor, cos_sin_BTd2: Tensor
    ) -> Tensor:
        """A step's tensors one by one: of a region's arguments a compiler knows these."""
        return self.block(x_BTD, layer, Step(None, position_BT, mask_BTS, cos_sin_BTd2))  # type: ignore[no-any-return]


def with_regions(model: Llama) -> Llama:
    """The same modules behind regions."""
    shell = copy.copy(model)
    shell._modules = {**model._modules, "blocks": nn.ModuleList(Region(block) for block in model.blocks)}
    return shell

"""The kernels as operators `torch.ops.llama_fast.*`: what torch.compile takes whole and puts into its CUDA graphs.

`custom_op` and not `triton_op`: inductor would re-emit the kernels of a `triton_op` without their programmatic dependent launch,
and there is nothing left to fuse. Eagerly an operator costs more host time than the plain function in `ops` that it calls.
Positions may be read ahead of the kernel before (`early`) only when nothing in the step wrote them: see `ops.attention`.
"""

import torch
from torch import Tensor

from llama_fast.kernels import ops


@torch.library.custom_op("llama_fast::qkv", mutates_args=("k_cache", "v_cache"))
def qkv(
    x: Tensor,
    gain: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: int,
    early: bool = False,
) -> Tensor:
    """`ops.qkv`."""
    return ops.qkv(x, gain, eps, weight, scale, ops.Rope(cos, sin, start, k_cache, v_cache, heads), early=early)


@qkv.register_fake
def _(
    x: Tensor,
    gain: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: int,
    early: bool = False,
) -> Tensor:
    return x.new_empty(x.shape[0], heads * k_cache.shape[3])


@torch.library.custom_op("llama_fast::attention", mutates_args=("part", "part_stats", "arrived"))
def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    part: Tensor,
    part_stats: Tensor,
    arrived: Tensor,
    early: bool = False,
) -> Tensor:
    """`ops.attention`, its scratch spelled out."""
    return ops.attention(q, k_cache, v_cache, start, ops.AttentionScratch(part, part_stats, arrived), early=early)


@attention.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    part: Tensor,
    part_stats: Tensor,
    arrived: Tensor,
    early: bool = False,
) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("llama_fast::linear_add", mutates_args=())
def linear_add(x: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor) -> Tensor:
    """`ops.linear_add`."""
    return ops.linear_add(x, weight, scale, residual)


@linear_add.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor) -> Tensor:
    return torch.empty_like(residual)


@torch.library.custom_op("llama_fast::gated", mutates_args=())
def gated(x: Tensor, gain: Tensor, eps: float, weight: Tensor, scale: Tensor | None) -> Tensor:
    """`ops.gated`."""
    return ops.gated(x, gain, eps, weight, scale)


@gated.register_fake
def _(x: Tensor, gain: Tensor, eps: float, weight: Tensor, scale: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2)


@torch.library.custom_op("llama_fast::head", mutates_args=())
def head(x: Tensor, gain: Tensor, eps: float, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`ops.linear` behind its norm: logits in `dtype`."""
    return ops.linear(x, weight, scale, gain=gain, eps=eps, dtype=dtype)


@head.register_fake
def _(x: Tensor, gain: Tensor, eps: float, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("llama_fast::argmax", mutates_args=("value", "id", "arrived"))
def argmax(logits: Tensor, value: Tensor, id: Tensor, arrived: Tensor) -> Tensor:
    """`ops.argmax`, its scratch spelled out."""
    return ops.argmax(logits, ops.ArgmaxScratch(value, id, arrived))


@argmax.register_fake
def _(logits: Tensor, value: Tensor, id: Tensor, arrived: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@torch.library.custom_op("llama_fast::embed", mutates_args=())
def embed(tokens: Tensor, table: Tensor) -> Tensor:
    """`ops.embed`."""
    return ops.embed(tokens, table)


@embed.register_fake
def _(tokens: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(tokens.numel(), table.shape[1])

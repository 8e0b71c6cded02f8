"""Int8 weights: one scale per output row, symmetric. Activations stay floating, so only the reading gets cheaper.

    >>> parts = Int8().encode(torch.tensor([[1.0, -0.5], [0.1, 0.0]]), torch.float32)
    >>> parts["weight"]
    tensor([[126, -63],
            [127,   0]], dtype=torch.int8)

The scale is max|row| / 127 rounded up to a bf16 number. Up, so that no weight leaves [-127, 127] and the error is at
most half a step everywhere; a bf16 number, so that the same file means the same matrix in every type of arithmetic:
stored integer x stored scale is exact in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from llama_fast.contracts import Cut, PartLayout, Parts
from llama_fast.encodings.cutting import cut_along_axes
from llama_fast.encodings.scales import ceil_bf16
from llama_fast.model.matvec import product
from llama_ref.checkpoint import TensorSource

LARGEST = 127


@dataclass(frozen=True)
class Int8:
    """A quarter of float32's bytes, half of bf16's."""

    name: str = field(default="int8", init=False)
    loader: ClassVar[str] = "rows"

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        return {"weight": (tuple(shape), torch.int8), "scale": ((shape[0], 1), None)}

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """{"weight": int8 [out, in], "scale": bf16 [out, 1]}; a row of zeros gets the smallest scale."""
        wide = weight.float()
        step = wide.abs().amax(1, keepdim=True) / LARGEST
        scale = ceil_bf16(step.clamp(min=torch.finfo(torch.bfloat16).tiny))
        whole = torch.round(wide / scale.float())
        return {"weight": whole.to(torch.int8), "scale": scale}

    def decode(self, parts: Parts) -> Tensor:
        """Float32 [out, in]: 8-bit integer times 8-bit mantissa, so nothing is rounded."""
        return parts["weight"].float() * parts["scale"].float()

    def cut(self, parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
        return cut_along_axes(parts, shape, cut)

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        """The sum runs over the integers' values, the scale is applied once per output."""
        return product(x, parts["weight"], parts["scale"])

    def rows(self, ids: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        return parts["weight"][ids].to(dtype) * parts["scale"][ids].to(dtype)


ENCODINGS = (Int8(),)

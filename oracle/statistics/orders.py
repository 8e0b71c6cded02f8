"""The same arithmetic in another legal order: what a yardstick's error is measured over.

A sum of rounded numbers depends on the order of its terms, and no order is the right one: libraries choose it by shape,
device and version. `with Order(seed):` runs any PyTorch code (the reference, our twin, a transformers model) with the
terms of every matrix product and mean permuted, the products cut into 1 to 8 partial sums that are added in turn
(split-K), fused attention written out or not, and angles (outer products) multiplied out in float32 by odd seeds, as most
implementations do. A product of unequal types is one with a stored matrix: exact numbers, summed wide, and rounded to the type of
its input, once as a sum and once more as it is scaled. Nothing else changes: the types in which products are rounded stay,
partial sums are kept in float32 or wider, so each order is what a careful kernel might do.

    >>> with Order(3):
    ...     logits = model(tokens)  # equal to model(tokens) but for rounding
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

PIECES = (1, 2, 4, 8)
MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
LINEARS = (F.linear, torch.ops.mkldnn._linear_pointwise)  # oneDNN's begins with the same arguments
SCALE = 0.7
"""Of a stored matrix; any number that is no power of two, so that the second rounding is another than the first."""
MEANS = (torch.mean, torch.Tensor.mean)


class Order(TorchFunctionMode):
    """One legal order of summation, the same at every run. Seed 0 is the order of the library itself."""

    def __init__(self, seed: int, exponentials: bool = False):
        """`exponentials`: where angles are multiplied out in float32, their frequencies come as exponentials too, as they do in
        some implementations; it matters beyond some thousand positions."""
        super().__init__()
        self.seed = seed
        self.frequencies = by_exponentials if exponentials else torch.Tensor.float
        self.writes_attention_out = bool(random.Random(seed).getrandbits(1))
        self._parts: dict[tuple[int, torch.device], list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MATMULS and args[0].dtype is not args[1].dtype:
            return self.stored(*args)
        if self.seed:
            if func in MATMULS and args[1].dim() >= 2:
                return self.product(args[0], -1, args[1], -2, torch.matmul)
            if func is torch.bmm:
                return self.product(args[0], -1, args[1], -2, torch.bmm)
            if func in LINEARS:
                return self.linear(*args[:3], **kwargs)
            if func is torch.einsum and len(args) == 3:
                return self.einsum(*args)
            if func is torch.outer and self.seed % 2 and args[0].dtype is torch.float64:
                return torch.outer(args[0].float(), self.frequencies(args[1])).double()
            if func in MEANS and args[1:] == (-1,) and args[0].is_floating_point():
                order = torch.cat(self.parts(args[0].shape[-1], args[0].device))
                return args[0].index_select(-1, order).mean(-1, **kwargs)
            if func is F.scaled_dot_product_attention and self.writes_attention_out and args[0].dtype != torch.float64:
                return self.attention(*args, **kwargs)
        return func(*args, **kwargs)

    def parts(self, length: int, device: torch.device) -> list[Tensor]:
        """The terms 0..length-1 shuffled and cut into pieces."""
        if (length, device) not in self._parts:
            draw = random.Random(f"{self.seed}:{length}")
            terms = list(range(length))
            draw.shuffle(terms)
            pieces = min(draw.choice(PIECES), length)
            cuts = [length * i // pieces for i in range(pieces + 1)]
            shuffled = torch.tensor(terms, device=device)
            self._parts[length, device] = [shuffled[a:b] for a, b in itertools.pairwise(cuts)]
        return self._parts[length, device]

    def product(self, a: Tensor, along_a: int, b: Tensor, along_b: int, multiply: Callable[..., Tensor]) -> Tensor:
        """multiply(a, b), whose sum runs along these two dimensions, piece by piece."""
        wide = a.dtype if a.dtype in (torch.float32, torch.float64) else torch.float32
        total: Tensor | None = None
        for part in self.parts(a.shape[along_a], a.device):
            term = multiply(selected(a, along_a, part).to(wide), selected(b, along_b, part).to(wide))
            total = term if total is None else total + term
        assert total is not None
        return total.to(a.dtype)

    def stored(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x @ an exact matrix in a wider type: what an encoding promises is stored integers, and the scale after the sum."""
        wide = x.to(matrix.dtype)
        y = self.product(wide, -1, matrix, -2, torch.matmul) if self.seed else torch.matmul(wide, matrix)
        return ((y / SCALE).to(x.dtype).to(y.dtype) * SCALE).to(x.dtype)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = self.product(input, -1, weight, -1, F.linear)
        return out if bias is None else out + bias

    def einsum(self, formula: str, a: Tensor, b: Tensor) -> Tensor:
        inputs, out = formula.replace(" ", "").split("->")
        left, right = inputs.split(",")
        (summed,) = (set(left) & set(right)) - set(out)
        return self.product(a, left.index(summed), b, right.index(summed), lambda x, y: torch.einsum(formula, x, y))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention as two products and a softmax in float32; weights and values in their own type."""
        if enable_gqa:
            share = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(share, -3), value.repeat_interleave(share, -3)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        score = self.product(query.float(), -1, key.float().mT, -2, torch.matmul) * scale
        if is_causal:
            attn_mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
        if attn_mask is not None:
            hidden = torch.zeros_like(attn_mask, dtype=score.dtype).masked_fill(~attn_mask, -math.inf)
            score = score + (hidden if attn_mask.dtype is torch.bool else attn_mask)
        return self.product(score.softmax(-1), -1, value.float(), -2, torch.matmul).to(query.dtype)


def selected(x: Tensor, along: int, part: Tensor) -> Tensor:
    """x.index_select(along, part); of a transposed matrix along its rows in memory, which takes a quarter of the time."""
    if along == -2 and x.dim() == 2 and x.stride(-2) == 1:
        return x.mT.index_select(-1, part).mT
    return x.index_select(along, part)


def by_exponentials(frequency_d: Tensor) -> Tensor:
    """Float32 frequencies whose exponent was rounded to float32, and is off by another half unit in its last place."""
    exponent_d = frequency_d.log().float()
    side_d = 1 - 2 * (torch.arange(len(exponent_d), device=exponent_d.device) % 2)
    return (exponent_d.double() * (1 + side_d * 2.0**-24)).float().exp()

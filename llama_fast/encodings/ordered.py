"""A matrix whose columns are stored in the order of their groups, not their own: GPTQ's "desc_act".

The part `order` int32 [1, in] says which column of the matrix each stored one is. All rows share it, so the activations are
put in that order once, and what multiplies them is the inner encoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llama_fast.contracts import Cut, Encoding, PartLayout, Parts
from llama_fast.encodings.int4 import of_name as int4_of_name
from llama_fast.encodings.int8_groups import of_name as int8_of_name
from llama_ref.checkpoint import TensorSource

ENDING = "-order"


@dataclass(frozen=True)
class Ordered:
    """`inner` holds the matrix with its columns sorted; its groups are of `inner.group` columns."""

    inner: Encoding
    loader: ClassVar[str] = ""

    @property
    def name(self) -> str:
        return self.inner.name + ENDING

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        return {**self.inner.layout(shape), "order": ((1, shape[1]), torch.int32)}

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """In the columns' own order: an order is found from a text, which encoding alone has not."""
        order = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device)
        return {**self.inner.encode(weight, dtype), "order": order[None]}

    def decode(self, parts: Parts) -> Tensor:
        inner, order = divided(parts)
        weight: Tensor = self.inner.decode(inner).index_select(1, order.argsort())
        return weight

    def cut(self, parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
        """Columns can be cut where the cut's are those of whole groups; ValueError, with numbers, elsewhere."""
        order = parts["order"][:][0].long()
        inner = {name: source for name, source in parts.items() if name != "order"}
        rows, start, stop = cut[0], *cut[1].indices(shape[1])[:2]
        held = self.inner.cut(inner, shape, (rows, slice(None)))
        if (start, stop) == (0, shape[1]):
            return {**held, "order": order.to(torch.int32)[None]}
        groups = tuple(parts["scale"].shape)[1]
        inside_GC = ((order >= start) & (order < stop)).view(groups, -1)
        whole_G, touched_G = inside_GC.all(1), inside_GC.any(1)
        if not torch.equal(whole_G, touched_G):
            torn = int((whole_G != touched_G).sum())
            raise ValueError(
                f"columns {start} to {stop} of {shape[1]} part {torn} of {groups} groups, whose columns stand in any order"
            )
        taken = {name: part.unflatten(1, (groups, -1))[:, whole_G].flatten(1) for name, part in held.items()}
        kept = order.view(groups, -1)[whole_G].flatten() - start
        return {**taken, "order": kept.to(torch.int32)[None]}

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        inner, order = divided(parts)
        return self.inner.product(x.index_select(-1, order), inner)

    def rows(self, ids: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        inner, order = divided(parts)
        return self.inner.rows(ids, inner, dtype).index_select(-1, order.argsort())


def divided(parts: Parts) -> tuple[dict[str, Tensor], Tensor]:
    """The inner encoding's parts, and the order [in]."""
    return {name: part for name, part in parts.items() if name != "order"}, parts["order"][0]


def of_name(name: str) -> Ordered | None:
    """ "int4-g64-order" -> Ordered(Int4(64)); None for other names."""
    if not name.endswith(ENDING):
        return None
    stem = name.removesuffix(ENDING)
    inner = int4_of_name(stem) or int8_of_name(stem)
    return None if inner is None else Ordered(inner)

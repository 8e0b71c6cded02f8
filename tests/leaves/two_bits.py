"""Two bits a weight, in groups of 64 columns: each group has a scale and a smallest value, and four steps from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.contracts import Cut, PartLayout, Parts
from llama_ref.checkpoint import TensorSource

GROUP, FOUR = 64, 4  # columns of a group, weights of a byte


@dataclass(frozen=True)
class TwoBits:
    name: str = field(default="two-bits", init=False)
    loader: ClassVar[str] = ""

    def layout(self, shape: Sequence[int]) -> dict[str, PartLayout]:
        widths = {"weight": -(-shape[1] // FOUR), "scale": -(-shape[1] // GROUP), "least": -(-shape[1] // GROUP)}
        return {name: ((shape[0], width), None) for name, width in {**widths, "columns": 1}.items()}

    def encode(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """{"weight": uint8 [out, in / 4], "scale", "least": bf16 [out, in / 64]}; the last group may be short."""
        wide = F.pad(weight.float(), (0, -weight.shape[1] % GROUP), value=float("nan")).unflatten(1, (-1, GROUP))
        least = wide.nan_to_num(torch.inf).amin(-1).bfloat16()
        scale = ((wide.nan_to_num(-torch.inf).amax(-1) - least.float()) / 3).clamp(min=1e-30).bfloat16()
        steps = ((wide - least.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 3).nan_to_num(0)
        fours = steps.flatten(1).to(torch.uint8).unflatten(1, (-1, FOUR))
        packed = sum(fours[..., i] << (2 * i) for i in range(FOUR))[:, : -(-weight.shape[1] // FOUR)]
        columns = torch.full((len(weight), 1), weight.shape[1])
        return {"weight": packed.contiguous(), "scale": scale, "least": least, "columns": columns}

    def decode(self, parts: Parts) -> Tensor:
        columns = int(parts["columns"][0, 0])
        steps = torch.stack([(parts["weight"] >> (2 * i)) & 3 for i in range(FOUR)], -1).flatten(1)[:, :columns].float()
        scale, least = (parts[name].float().repeat_interleave(GROUP, 1)[:, :columns] for name in ("scale", "least"))
        return steps * scale + least

    def cut(self, parts: Mapping[str, TensorSource], shape: Sequence[int], cut: Cut) -> dict[str, Tensor]:
        rows, columns = cut
        first, stop, _ = columns.indices(shape[1])
        if first % GROUP or (stop % GROUP and stop != shape[1]):
            raise ValueError(f"columns {first} to {stop} of {shape[1]} part a group of {GROUP}")
        ends = {"weight": (first // FOUR, -(-stop // FOUR)), "columns": (0, 1)}
        groups = first // GROUP, -(-stop // GROUP)
        kept = {name: held[rows, slice(*ends.get(name, groups))].contiguous() for name, held in parts.items()}
        return kept | {"columns": torch.full_like(kept["columns"], stop - first)}

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        return F.linear(x, self.decode(parts).to(x.dtype))

    def rows(self, ids: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        return self.decode(parts)[ids].to(dtype)

"""PyTorch's operators: what runs on every device, and what a compiler can make kernels of.

Shapes: B batch, T tokens, S cache slots, D model width, H query heads, K key/value heads, d head width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.contracts import KVCache, LayerCache, Slots
from llama_fast.model.attention import attend, visible
from llama_fast.model.rope import rotate
from llama_fast.processes import AllReduce
from llama_fast.step import Step
from llama_ref.config import LlamaConfig


@dataclass(frozen=True)
class PyTorch:
    """The plain arithmetic."""

    name: str = field(default="", init=False)

    def bind(self, config: LlamaConfig, slots: Slots, device: torch.device) -> Operators:
        return Operators(config.head_dim, config.window, slots.shard.all_reduce)


@dataclass(frozen=True)
class Operators:
    """The operations of one model; every stage of a block that the reference has can be seen."""

    head_dim: int
    window: int | None
    all_reduce: AllReduce
    compilable: ClassVar[bool] = True
    needs_joined: ClassVar[bool] = False
    sampling_kernels: ClassVar[None] = None

    def place(self, rope_table: Tensor, tokens_BT: Tensor, start_B: Tensor | None, cache: KVCache) -> Step:
        B, T = tokens_BT.shape[:2]
        step_1T = torch.arange(T, device=tokens_BT.device)[None, :]
        position_BT = step_1T.expand(B, T) if start_B is None else start_B[:, None] + step_1T
        mask_BTS = None
        if start_B is not None or (self.window is not None and self.window < T):
            mask_BTS = visible(position_BT, cache.length, self.window)
        return Step(start_B, position_BT, mask_BTS, rope_table[position_BT])

    def embed(self, tokens_BT: Tensor, embedding: nn.Module | None) -> Tensor:
        return tokens_BT if embedding is None else embedding(tokens_BT)  # type: ignore[no-any-return]

    def qkv(self, x_BTD: Tensor, norm: nn.Module, matrix: nn.Module, layer: LayerCache, step: Step) -> Tensor:
        assert step.cos_sin_BTd2 is not None and step.position_BT is not None
        B, T, _ = x_BTD.shape
        n_BTD = norm(x_BTD)
        q_BTHd, k_BTKd, v_BTKd = (part.view(B, T, -1, self.head_dim) for part in matrix(n_BTD))
        step.see(attention_norm=n_BTD, q=q_BTHd, k=k_BTKd, v=v_BTKd)
        q_BTHd, k_BTKd = rotate(q_BTHd, step.cos_sin_BTd2), rotate(k_BTKd, step.cos_sin_BTd2)
        step.see(q_rope=q_BTHd, k_rope=k_BTKd)
        layer.put(k_BTKd, v_BTKd, step.position_BT)
        return q_BTHd

    def attend(self, q_BTHd: Tensor, layer: LayerCache, step: Step) -> Tensor:
        # a layer whose `k` and `v` are copies gives some rows at a time, small enough to be read at once
        if torch.compiler.is_compiling() or not hasattr(layer, "parts"):
            a_BTHd = self._attended(q_BTHd, layer.k, layer.v, step.mask_BTS)
        else:
            of_parts = [
                self._attended(q_BTHd[rows], k_BKSd, v_BKSd, None if step.mask_BTS is None else step.mask_BTS[rows])
                for rows, k_BKSd, v_BKSd in layer.parts()
            ]
            a_BTHd = of_parts[0] if len(of_parts) == 1 else torch.cat(of_parts)
        step.see(attention=a_BTHd)
        return a_BTHd

    def _attended(self, q_BTHd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, mask_BTS: Tensor | None) -> Tensor:
        if mask_BTS is None:
            T = q_BTHd.shape[1]
            # narrow, not a slice: a compiler then knows that there are as many keys as queries
            k_BKSd, v_BKSd = k_BKSd.narrow(2, 0, T), v_BKSd.narrow(2, 0, T)
        return attend(q_BTHd, k_BKSd, v_BKSd, None if mask_BTS is None else mask_BTS[:, None])

    def add(self, a_BTK: Tensor, matrix: nn.Module, x_BTD: Tensor, step: Step) -> Tensor:
        y_BTD: Tensor = matrix(a_BTK)
        step.see_part(y_BTD)
        return x_BTD + self.all_reduce(y_BTD)

    def gated(self, x_BTD: Tensor, norm: nn.Module, matrix: nn.Module, step: Step) -> Tensor:
        n_BTD = norm(x_BTD)
        gate_BTF, up_BTF = matrix(n_BTD)
        h_BTF: Tensor = F.silu(gate_BTF) * up_BTF
        step.see(ffn_norm=n_BTD, ffn_hidden=h_BTF)
        return h_BTF

    def head(self, x_BTD: Tensor, norm: nn.Module, matrix: nn.Module, step: Step) -> Tensor:
        n_BTD = norm(x_BTD)
        # float32, so that whoever compares, samples or takes the argmax sees the same numbers: a compiler that fuses the
        # argmax into the head would else choose by digits that bf16 logits no longer show
        logits_BTV: Tensor = matrix(n_BTD).float()
        step.see(norm=n_BTD, logits=logits_BTV)
        return logits_BTV

    def choose_tiles(self, run: Callable[[], Any], rows: int, weight_bytes: int) -> None:
        """Nothing: libraries have their own."""

    def compile_ahead(self, run: Callable[[], Any], rows: int) -> None:
        """Nothing: operators are compiled already, or by the plan's compiler."""

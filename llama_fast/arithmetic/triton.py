"""Kernels of our own for few rows, and PyTorch's products for many, with one kernel between each two.

A step of few rows is five launches a block (seven over ranks: each sum is a launch): each reads its weights once, at the speed of
the memory, and starts loading them before the kernel ahead of it has ended. Attention reads the valid part of the cache and no
more. More rows, and long prompts, are bound by arithmetic: each operation then takes PyTorch's matrix product by itself, for
the shapes that its kernel is not made for. Nothing is compiled but the kernels, in seconds.

Shapes: B batch, T tokens, M = B x T rows, D model width, H query heads, d head width, F hidden width, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.choosing import SamplingKernels
from llama_fast.contracts import KVCache, LayerCache, Slots
from llama_fast.kernels import available, interpreted
from llama_fast.model.attention import visible
from llama_fast.processes import AllReduce
from llama_fast.step import Step
from llama_ref.config import LlamaConfig

if TYPE_CHECKING:
    from llama_fast.kernels import first_use, ops


LEAST_CAPABILITY = (8, 0)  # bf16 on tensor cores, copies into shared memory that do not wait
MOST_PROMPT_ROWS = 128
"""Rows (B x T) of prompts that our attention takes: for more, its scratch memory would grow into gigabytes."""


@dataclass(frozen=True)
class Triton:
    """The kernels of `llama_fast.kernels`. Needs a CUDA device (or Triton's interpreter) and joined projections."""

    name: str = field(default="triton", init=False)

    def bind(self, config: LlamaConfig, slots: Slots, device: torch.device) -> Kernels:
        asked = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias, "window": config.window}
        for name, value in asked.items():
            if value:
                raise ValueError(f"the fused kernels do not do {name}={value}: take Compiled() for this model")
        if not (slots.cache.plain_slots or hasattr(slots.cache, "bits")):
            kind = type(slots.cache).__name__
            raise ValueError(f"the fused kernels write no {kind} cache: take Static(), or Compiled() with this one")
        if not slots.fuse_projections:
            raise ValueError("the fused kernels need joined projections: Plan(fuse_projections=True)")
        if device.type != "cuda" and not interpreted():
            raise ValueError("the fused kernels need a CUDA device; on a CPU take Compiled()")
        if not available():
            raise ValueError("the fused kernels need Triton, which is not installed (pip install triton)")
        if device.type == "cuda":
            check_card(torch.cuda.get_device_properties(device))
        return Kernels(config, slots.shard.all_reduce, device)


def check_card(card: Any) -> None:
    """ValueError for a GPU, as `torch.cuda.get_device_properties` tells it, that lacks what the kernels are made of.

    Warns of one whose tiles are neither measured nor may be found at first use; Python says it once.
    """
    from llama_fast.kernels.found import is_on  # lazy import: Triton is optional
    from llama_fast.kernels.tuning import untuned

    if (card.major, card.minor) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise ValueError(
            f"the fused kernels need compute capability {least} or more, and {card.name} has {card.major}.{card.minor}: "
            "take Compiled()"
        )
    finds, notice = is_on(), untuned(card.name)
    if notice is not None and not finds:
        warnings.warn(notice, stacklevel=2)


class Kernels:
    """The operations of one model. Scratch memory is kept, so that a CUDA graph finds it where it was."""

    compilable = False
    needs_joined = True

    def __init__(self, config: LlamaConfig, all_reduce: AllReduce, device: torch.device):
        from llama_fast.kernels import first_use, found, launching, many_rows, ops  # lazy import: Triton is optional

        self.ops, self.many, self.launching = ops, many_rows, launching
        self.first_use, self.found_tiles = first_use, found.found_tiles
        if device.type == "cuda":
            launching.triton_ready()  # while the weights come
        self._choosing: first_use.FirstUse | None = None
        self.sampling_kernels: SamplingKernels = ops
        self.config, self.all_reduce, self.device = config, all_reduce, device
        self.group = config.n_heads // config.n_kv_heads
        self._scratch: dict[int, ops.AttentionScratch] = {}
        self._cos_sin: tuple[Tensor, Tensor] | None = None
        self._zeros: dict[int, Tensor] = {}
        self._counted: dict[int, Tensor] = {}
        self._embedded_by_kernel = True

    def place(self, rope_table: Tensor, tokens_BT: Tensor, start_B: Tensor | None, cache: KVCache) -> Step:
        """Kernels find positions by the start of each row; a mask is made where PyTorch attends to more than the new tokens."""
        B, T = tokens_BT.shape[:2]
        if self._cos_sin is None:
            self._cos_sin = rope_table[..., 0].contiguous(), rope_table[..., 1].contiguous()
        table = getattr(cache.layers[0], "table", None)  # of pages: slots are found once for all layers
        if start_B is None:
            # made here, not where it is read: a kernel behind `embed` may read it before the kernel ahead has ended
            start_B, mask = self.zeros(B), False
        else:
            mask = not self.attends(B, T)
        if not mask and table is None:
            return Step(start_B)
        position_BT = start_B[:, None] + torch.arange(T, device=tokens_BT.device)
        mask_BTS = visible(position_BT, cache.length, None) if mask else None
        return Step(start_B, mask_BTS=mask_BTS, slots_BT=None if table is None else table.slots_at(position_BT))

    def embed(self, tokens_BT: Tensor, embedding: nn.Module | None) -> Tensor:
        if embedding is None:
            self._embedded_by_kernel = False
            return tokens_BT.clone()  # blocks write over it, and a pass may be run again to time its tiles
        weight, scale = matrix_of(embedding)
        self._embedded_by_kernel = scale is None and isinstance(weight, Tensor)
        if not self._embedded_by_kernel:
            return embedding(tokens_BT)  # type: ignore[no-any-return]
        tokens_M = tokens_BT.reshape(-1).contiguous()  # a column of a larger tensor flattens to a view with gaps
        return self.ops.embed(tokens_M, weight).view(*tokens_BT.shape, -1)

    def qkv(self, x_BTD: Tensor, norm: nn.Module, matrix: nn.Module, layer: LayerCache, step: Step) -> Tensor:
        B, T, _ = x_BTD.shape
        start_B = step.start_B
        assert self._cos_sin is not None and start_B is not None
        gain, eps = gain_of(norm)
        x_MD, (weight, scale) = x_BTD.flatten(0, 1), matrix_of(matrix)
        (keys, values), at_M = layer.tensors[:2], None if step.slots_BT is None else step.slots_BT.flatten()
        in_eight_bits = hasattr(layer, "steps")
        if in_eight_bits:  # a head's largest number is known when all of it is: another kernel writes the cache
            new = x_MD.new_empty(2, len(x_MD), self.config.n_kv_heads, self.config.head_dim)
            keys, values = new.unbind()
        to_M = self.counted(len(x_MD)) if in_eight_bits else at_M
        rope = self.ops.Rope(*self._cos_sin, start_B, keys, values, self.config.n_heads, to_M)
        if self.ops.takes(B * T, weight, x_MD):
            q = self.ops.qkv(x_MD, gain, eps, weight, scale, rope, early=self._embedded_by_kernel)
        else:
            told = self.ops.widened_at_every_step(B, weight) if T == 1 else ""  # a prompt is read once
            if told:
                warnings.warn(told, stacklevel=2)
            q = self.many.rotate_and_store(self.many.wide_linear(x_MD, weight, scale, gain, eps), rope, x_MD.dtype)
        q_BTHd = q.view(B, T, self.config.n_heads, -1)
        if in_eight_bits:
            self.ops.keep_in_eight_bits((keys, values), layer.tensors, start_B, at_M)
            step.see(v=values.view(B, T, *values.shape[1:]), q_rope=q_BTHd, k_rope=keys.view(B, T, *keys.shape[1:]))
        elif step.show is not None:
            at = (start_B[:, None] + torch.arange(T, device=x_BTD.device))[:, None, :, None]
            k, v = (t.gather(2, at.expand(-1, t.shape[1], -1, t.shape[3])).transpose(1, 2) for t in (layer.k, layer.v))
            step.see(v=v, q_rope=q_BTHd, k_rope=k)
        return q_BTHd

    def attend(self, q_BTHd: Tensor, layer: LayerCache, step: Step) -> Tensor:
        B, T = q_BTHd.shape[:2]
        if self.attends(B, T):
            assert step.start_B is not None
            q_MK, scratch = q_BTHd.flatten(2).flatten(0, 1), self.scratch(B * T)
            pages = getattr(layer, "table", None)
            table = None if pages is None else self.ops.Table(pages.pages_BP, pages.page)
            keys, values, *steps = layer.tensors
            a = self.ops.attention(
                q_MK, keys, values, step.start_B, scratch, early=self._embedded_by_kernel, table=table,
                steps=(steps[0], steps[1]) if steps else None,
            )  # fmt: skip
            a_BTHd = a.view(q_BTHd.shape)
        else:
            k_BKSd, v_BKSd = layer.k, layer.v
            slots = T if step.mask_BTS is None else k_BKSd.shape[2]
            mask_B1TS = None if step.mask_BTS is None else step.mask_BTS[:, None]
            a_BTHd = F.scaled_dot_product_attention(
                q_BTHd.transpose(1, 2), k_BKSd[:, :, :slots], v_BKSd[:, :, :slots], mask_B1TS,
                is_causal=mask_B1TS is None, enable_gqa=self.group != 1,
            ).transpose(1, 2)  # fmt: skip
        step.see(attention=a_BTHd)
        return a_BTHd

    def add(self, a_BTK: Tensor, matrix: nn.Module, x_BTD: Tensor, step: Step) -> Tensor:
        a_MK, x_MD, (weight, scale) = a_BTK.flatten(0, 1), x_BTD.flatten(0, 1), matrix_of(matrix)
        if self.ops.takes(len(x_MD), weight, a_MK):
            x_MD = self.add_product(a_MK, weight, scale, x_MD)
        elif isinstance(weight, Tensor) and weight.dtype == x_MD.dtype and self.all_reduce.alone:
            x_MD.addmm_(a_MK, weight.t())
        elif self.all_reduce.alone:
            x_MD = self.many.add_wide(x_MD, self.many.wide_linear(a_MK, weight, scale))
        else:
            x_MD.add_(self.all_reduce(self.many.wide_linear(a_MK, weight, scale).value(x_MD.dtype)))
        return x_MD.view(x_BTD.shape)

    def add_product(self, a_MK: Tensor, weight: Any, scale: Tensor | None, x_MD: Tensor) -> Tensor:
        """x plus a few rows' product, summed over all processes."""
        exchange = self.all_reduce.exchange
        if self.all_reduce.alone:
            return self.ops.linear_add(a_MK, weight, scale, x_MD)
        if exchange is not None and len(a_MK) == 1 and not exchange.apart:
            return exchange.add_product(a_MK, weight, scale, x_MD)  # type: ignore[no-any-return]
        # float32 until x is added
        return self.all_reduce(self.ops.linear(a_MK, weight, scale, dtype=torch.float32), x_MD)

    def gated(self, x_BTD: Tensor, norm: nn.Module, matrix: nn.Module, step: Step) -> Tensor:
        x_MD, (weight, scale), (gain, eps) = x_BTD.flatten(0, 1), matrix_of(matrix), gain_of(norm)
        if self.ops.takes(len(x_MD), weight, x_MD):
            h_MF = self.ops.gated(x_MD, gain, eps, weight, scale)
        else:
            h_MF = self.many.gate(self.many.wide_linear(x_MD, weight, scale, gain, eps), x_MD.dtype)
        h_BTF = h_MF.view(*x_BTD.shape[:2], -1)
        step.see(ffn_hidden=h_BTF)
        return h_BTF

    def head(self, x_BTD: Tensor, norm: nn.Module, matrix: nn.Module, step: Step) -> Tensor:
        x_MD, (weight, scale), (gain, eps) = x_BTD.flatten(0, 1).contiguous(), matrix_of(matrix), gain_of(norm)
        if self.ops.takes(len(x_MD), weight, x_MD):
            logits_MV = self.ops.linear(x_MD, weight, scale, gain=gain, eps=eps, dtype=torch.float32)
        else:
            logits_MV = self.many.wide_linear(x_MD, weight, scale, gain, eps).value(torch.float32)
        logits_MV = getattr(matrix, "gather", whole)(logits_MV)
        logits_BTV: Tensor = logits_MV.view(*x_BTD.shape[:2], -1)
        step.see(logits=logits_BTV)
        return logits_BTV

    def choose_tiles(self, run: Callable[[], Any], rows: int, weight_bytes: int) -> None:
        if self.device.type != "cuda" or not self.in_kernels(rows):
            return
        if weight_bytes < self.first_use.LEAST_IN_CACHES * torch.cuda.get_device_properties(self.device).L2_cache_size:
            return
        if self._choosing is None:
            ranks = self.first_use.Ranks(self._summed)
            found = self.found_tiles(self.ops.machine(self.device).name)
            self._choosing = self.first_use.FirstUse(found, self.first_use.Replays(ranks), ranks)
        self._choosing.choose(run)

    def _summed(self, numbers: Sequence[float]) -> list[float]:
        """Each number's sum over all ranks."""
        if self.all_reduce.alone:
            return list(numbers)
        told = torch.zeros(-(-len(numbers) // 8) * 8, device=self.device)
        told[: len(numbers)] = torch.tensor(numbers, device=self.device)
        return self.all_reduce(told)[: len(numbers)].tolist()  # type: ignore[no-any-return]

    def compile_ahead(self, run: Callable[[], Any], rows: int) -> None:
        if self.in_kernels(rows):  # else collectives would exchange what no kernel has written
            with self.launching.compiled_together():
                run()

    def in_kernels(self, rows: int) -> bool:
        """Whether all that a step of so many rows tells other processes is sent by our kernels."""
        exchange, c = self.all_reduce.exchange, self.config
        if exchange is None:
            return self.all_reduce.alone
        return bool(exchange.takes(rows, max(c.dim * exchange.mailbox.size, c.vocab_size)))

    def attends(self, B: int, T: int) -> bool:
        """Whether our attention takes B rows of T tokens. It is compiled for each T: up to eight, and for a few powers of two."""
        if T * self.group > self.ops.MOST_ATTENTION_ROWS:
            return False
        return T <= self.ops.MOST_ROWS or (T & (T - 1) == 0 and B * T <= MOST_PROMPT_ROWS)

    def scratch(self, rows: int) -> ops.AttentionScratch:
        """Room for the partial results of a step of so many rows, or of up to twice as many."""
        rows = 1 << max(3, (rows - 1).bit_length())
        if rows not in self._scratch:
            c = self.config
            self._scratch[rows] = self.ops.AttentionScratch.of(rows, c.n_heads, c.n_kv_heads, c.head_dim, self.device)
        return self._scratch[rows]

    def counted(self, rows: int) -> Tensor:
        """The numbers of so many rows."""
        if rows not in self._counted:
            self._counted[rows] = torch.arange(rows, device=self.device)
        return self._counted[rows]

    def zeros(self, B: int) -> Tensor:
        """The start of rows with nothing before."""
        if B not in self._zeros:
            self._zeros[B] = torch.zeros(B, dtype=torch.int64, device=self.device)
        return self._zeros[B]


def matrix_of(module: Any) -> tuple[Any, Tensor | None]:
    """The weight of a product or a table as the kernels read it, and the scale of its rows if it has one."""
    from llama_fast.kernels.stored import LOADERS  # lazy import: Triton is optional

    stored = getattr(module, "linear", module)
    return LOADERS[stored.encoding.loader](stored.parts)


def gain_of(norm: Any) -> tuple[Tensor, float]:
    """A norm's weight and epsilon."""
    return norm.weight, norm.eps


def whole(logits_MV: Tensor) -> Tensor:
    """Logits that no other process holds a part of."""
    return logits_MV

"""A token as five launches a block, replayed as one CUDA graph (seven over ranks: each sum is a launch). Where `Compiled` lets a
compiler write the kernels, these are written for one to eight rows: each reads its weights once, at the speed of the memory, and
starts loading them before the kernel ahead of it has ended. Attention reads the valid part of the static cache and no more.

Decode, the check of a few proposed tokens, and the prefill of a short prompt are such steps; a longer prompt is bound by
arithmetic, and goes through PyTorch's matrix products with one kernel between each two. Nothing is compiled but the
kernels themselves, in seconds.

Shapes: B batch, T tokens, M = B x T rows, D model width, V vocabulary.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.matvec import product
from llama_fast.model import Block, Joined, Llama, SplitHead
from llama_fast.plan import AllReduce, Alone, DenseEmbedding, KVCache, Phase
from llama_fast.sampling import Chooser, Choosing
from llama_ref.config import LlamaConfig

if TYPE_CHECKING:
    from llama_fast.kernels import ops

MOST_ROWS = 8
LEAST_CAPABILITY = (8, 0)  # bf16 on tensor cores, copies into shared memory that do not wait
MOST_QUERY_ROWS = 64  # tokens x query heads per key/value head, in one attention launch


@dataclass(frozen=True)
class Fused:
    """Decode by the kernels of `llama_fast.kernels`. Needs a CUDA device, joined projections and a static cache."""

    compiles_each_shape: ClassVar[bool] = False

    @property
    def choosing(self) -> Choosing:
        """The kernels of `ops` that choose."""
        from llama_fast.kernels import ops  # Triton is imported by who uses it

        return ops

    def compile(self, prefill: Phase, decode: Phase, model: nn.Module) -> tuple[Phase, Phase]:
        """Raises ValueError where the kernels cannot run."""
        assert isinstance(model, Llama)
        check_supported(model.config)
        if model.rope_table.device.type != "cuda":
            raise ValueError("the fused kernels need a CUDA device; on a CPU take Compiled()")
        check_card(torch.cuda.get_device_properties(model.rope_table.device))
        if not all(isinstance(block.qkv, Joined) for block in model.blocks):
            raise ValueError("the fused kernels need joined projections: Plan(fuse_projections=True)")
        step = FusedStep(model)

        def fused_prefill(
            unused: nn.Module, tokens_BT: Tensor, lengths_B: Tensor, cache: KVCache, choose: Chooser
        ) -> tuple[Tensor, Tensor]:
            B, T = tokens_BT.shape
            width = MOST_ROWS // B  # every short prompt is padded to one width: one graph serves them all
            if width < T or not step.takes(B, width) or cache.length < width:
                logits_BV = step.prompt(tokens_BT, lengths_B, cache)
                return choose(logits_BV, lengths_B), logits_BV
            padded_BT = F.pad(tokens_BT, (0, width - T))
            logits_BTV = step(padded_BT, torch.zeros_like(lengths_B), cache)[1]
            logits_BV = logits_BTV[torch.arange(B, device=lengths_B.device), lengths_B - 1]
            return choose(logits_BV, lengths_B), logits_BV

        def fused_decode(
            unused: nn.Module, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: Chooser
        ) -> tuple[Tensor, Tensor]:
            B, T = tokens_BT.shape
            if not step.takes(B, T):
                return decode(model, tokens_BT, start_B, cache, choose)
            token_B, logits_BTV = step(tokens_BT, start_B, cache)
            if not (choose.greedy and T == 1):
                token_B = choose(logits_BTV[:, -1], start_B + T)
            return token_B, logits_BTV

        return fused_prefill, fused_decode


def check_supported(config: LlamaConfig) -> None:
    """ValueError, by the name of the field, where a model asks for what the kernels do not do."""
    asked = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias, "window": config.window}
    for name, value in asked.items():
        if value:
            raise ValueError(f"the fused kernels do not do {name}={value}: take Compiled() for this model")


def check_card(card: Any) -> None:
    """ValueError for a GPU, as `torch.cuda.get_device_properties` tells it, that lacks what the kernels are made of.

    Warns of one whose tiles are not measured; Python says it once.
    """
    from llama_fast.kernels.tuning import untuned  # Triton is imported by who uses it

    if (card.major, card.minor) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise ValueError(
            f"the fused kernels need compute capability {least} or more, and {card.name} has {card.major}.{card.minor}: "
            "take Compiled()"
        )
    notice = untuned(card.name)
    if notice is not None:
        warnings.warn(notice, stacklevel=2)


@dataclass(frozen=True)
class Recorded:
    """A CUDA graph of one step, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    tokens_BT: Tensor
    start_B: Tensor
    token_B: Tensor
    logits_BTV: Tensor


class FusedStep:
    """One step of a model: run once as it is, which compiles its kernels, then recorded, then replayed.

    A graph belongs to a cache (it holds the cache's addresses) and to a shape (B, T), and is dropped with the cache.
    What a step returns is overwritten by the next one.
    """

    def __init__(self, model: Llama):
        from llama_fast.kernels import ops  # Triton is imported by who uses it
        from llama_fast.kernels.launching import compiled_together

        self.ops, self.compiled_together = ops, compiled_together
        self.model = model
        self.cos = model.rope_table[..., 0].contiguous()
        self.sin = model.rope_table[..., 1].contiguous()
        block: Any = model.blocks[0]
        self.all_reduce: AllReduce = block.all_reduce
        self.recorded: weakref.WeakKeyDictionary[KVCache, dict[tuple[int, int], Recorded]] = weakref.WeakKeyDictionary()
        config, device = model.config, model.rope_table.device
        self.attention_scratch = ops.AttentionScratch.of(
            MOST_ROWS, config.n_heads, config.n_kv_heads, config.head_dim, device
        )
        self.argmax_scratch = ops.ArgmaxScratch.of(MOST_ROWS, config.vocab_size, device)

    def takes(self, B: int, T: int) -> bool:
        """Whether the kernels are made for so many rows."""
        group = self.model.config.n_heads // self.model.config.n_kv_heads
        return 1 <= B * T <= MOST_ROWS and T * group <= MOST_QUERY_ROWS

    def __call__(self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """The likeliest next token [B] and the logits [B, T, V], float32."""
        B, T = tokens_BT.shape
        shapes = self.recorded.setdefault(cache, {})
        if (B, T) not in shapes:
            config = self.model.config
            # Collectives would exchange what no kernel has written.
            if self.all_reduce.in_kernels(B * T, config.dim, config.vocab_size):
                with self.compiled_together():
                    self.run(tokens_BT, start_B, cache, blocks=1)
            result = self.run(tokens_BT, start_B, cache)
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
        with torch.cuda.graph(
            graph, capture_error_mode="thread_local"
        ):  # a process group's watchdog has its own thread
            token_B, logits_BTV = self.run(tokens_BT, start_B, cache)
        return Recorded(graph, tokens_BT, start_B, token_B, logits_BTV)

    def run(
        self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, blocks: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Launch every kernel of the step, or those of its first `blocks` alone."""
        ops, model = self.ops, self.model
        (B, T), config = tokens_BT.shape, model.config
        tokens_M = tokens_BT.reshape(-1).contiguous()  # a column of a larger tensor flattens to a view with gaps
        dense = isinstance(model.embedding, DenseEmbedding)
        x_MD = ops.embed(tokens_M, model.embedding.weight) if dense else model.embedding(tokens_M)
        for block, layer in zip(model.blocks[:blocks], cache.layers[:blocks], strict=True):
            assert isinstance(block, Block)
            rope = ops.Rope(self.cos, self.sin, start_B, layer.k, layer.v, config.n_heads)
            x_MD = self.block(block, x_MD, rope, early=dense)
        logits_MV = ops.linear(
            x_MD, *matrix(model.head), gain=model.norm.weight, eps=config.norm_eps, dtype=torch.float32
        )
        if isinstance(model.head, SplitHead):
            logits_MV = model.head.gather(logits_MV)
        token_M = ops.argmax(logits_MV, self.argmax_scratch)
        return token_M.view(B, T)[:, -1], logits_MV.view(B, T, -1)

    def prompt(self, tokens_BT: Tensor, lengths_B: Tensor, cache: KVCache) -> Tensor:
        """Prefill of a long prompt: logits [B, V] at each row's last token. PyTorch's products and attention, one kernel
        between each two of them."""
        ops, model, (B, T) = self.ops, self.model, tokens_BT.shape
        config, eps = model.config, model.config.norm_eps
        x_MD = model.embedding(tokens_BT).flatten(0, 1)
        for block, layer in zip(model.blocks, cache.layers, strict=True):
            assert isinstance(block, Block)
            qkv = product(ops.rms_norm(x_MD, block.attention_norm.weight, eps), *matrix(block.qkv))
            q = ops.turn_and_store(qkv, self.cos, self.sin, layer.k, layer.v, config.n_heads)
            a_BHTd = F.scaled_dot_product_attention(
                q.view(B, T, config.n_heads, config.head_dim).transpose(1, 2), layer.k[:, :, :T], layer.v[:, :, :T],
                is_causal=True, enable_gqa=config.n_heads != config.n_kv_heads,
            )  # fmt: skip
            add_product(x_MD, a_BHTd.transpose(1, 2).reshape(B * T, -1), block.wo, block.all_reduce)
            gate_up = product(ops.rms_norm(x_MD, block.ffn_norm.weight, eps), *matrix(block.gate_up))
            add_product(x_MD, ops.gate(gate_up), block.w2, block.all_reduce)
        x_BD = x_MD.view(B, T, -1)[torch.arange(B, device=lengths_B.device), lengths_B - 1]
        return model.head(model.norm(x_BD)).float()  # type: ignore[no-any-return]

    def block(self, block: Block, x_MD: Tensor, rope: ops.Rope, early: bool) -> Tensor:
        """Norm, q k v, rotary and cache write; attention; out and residual; norm and gate; down and residual."""
        ops, eps = self.ops, self.model.config.norm_eps
        q = ops.qkv(x_MD, block.attention_norm.weight, eps, *matrix(block.qkv), rope, early=early)
        a = ops.attention(q, rope.k_cache, rope.v_cache, rope.start, self.attention_scratch, early=early)
        x_MD = self.linear_add(a, block.wo, x_MD, block.all_reduce)
        hidden = ops.gated(x_MD, block.ffn_norm.weight, eps, *matrix(block.gate_up))
        return self.linear_add(hidden, block.w2, x_MD, block.all_reduce)

    def linear_add(self, a_MK: Tensor, linear: nn.Module, x_MD: Tensor, all_reduce: AllReduce) -> Tensor:
        """x + a @ weight.T; over several processes the sum of their products, in float32 until x is added."""
        if isinstance(all_reduce, Alone):
            return self.ops.linear_add(a_MK, *matrix(linear), x_MD)
        return all_reduce.add_product(a_MK, *matrix(linear), x_MD)


def add_product(x_MD: Tensor, a_MK: Tensor, linear: nn.Module, all_reduce: AllReduce) -> None:
    """x += a @ weight.T, in one pass where the weight needs no decoding and no other process has a part in it."""
    weight_DK, scale = matrix(linear)
    if scale is None and isinstance(all_reduce, Alone):
        x_MD.addmm_(a_MK, weight_DK.t())
    else:
        x_MD.add_(all_reduce(product(a_MK, weight_DK, scale)))


def matrix(module: Any) -> tuple[Tensor, Tensor | None]:
    """A linear module's stored weight and its scale, if it has one."""
    linear: Any = module.linear if isinstance(module, (Joined, SplitHead)) else module
    return linear.weight, getattr(linear, "scale", None)

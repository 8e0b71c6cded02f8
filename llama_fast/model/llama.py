"""The same Llama, arranged to be fast: a cache and a position come in, so a token costs one pass over the weights.

This is the one forward pass of the library. It says in which order things happen; its `operations` say how a norm, a
product or an attention is computed (by PyTorch's operators, or by kernels of our own), and how several processes sum.

Shapes: B batch, T tokens, D model width, H query heads, d head width, F hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.contracts import KVCache, LayerCache, Operations
from llama_fast.model.rope import rope_table
from llama_fast.step import Show, Step
from llama_ref.config import LlamaConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # float32: a bf16 sum of squares over 4096 terms has two digits
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class Block(nn.Module):
    """Attention and the gated feed-forward, each added to the residual stream.

    `projections` holds the modules qkv, wo, gate_up and w2; `norms` the two weights [D].
    """

    def __init__(
        self,
        config: LlamaConfig,
        norms: Mapping[str, Tensor],
        projections: Mapping[str, nn.Module],
        operations: Operations,
    ):
        super().__init__()
        self.operations = operations
        self.attention_norm = RMSNorm(norms["attention_norm"], config.norm_eps)
        self.ffn_norm = RMSNorm(norms["ffn_norm"], config.norm_eps)
        self.qkv = projections["qkv"]
        self.wo = projections["wo"]
        self.gate_up = projections["gate_up"]
        self.w2 = projections["w2"]

    def forward(self, x_BTD: Tensor, layer: LayerCache, step: Step) -> Tensor:
        """The residual stream after this block. It may be written over `x_BTD`."""
        q_BTHd = self.operations.qkv(x_BTD, self.attention_norm, self.qkv, layer, step)
        a_BTHd = self.operations.attend(q_BTHd, layer, step)
        x_BTD = self.operations.add(a_BTHd.flatten(2), self.wo, x_BTD, step.part("attention_out"))
        h_BTF = self.operations.gated(x_BTD, self.ffn_norm, self.gate_up, step)
        return self.operations.add(h_BTF, self.w2, x_BTD, step.part("ffn_out"))


class Llama(nn.Module):
    """Tokens and their positions in, logits out; keys and values are kept in the cache that is passed.

    A stage of a model has some of the blocks. Behind the first there is no embedding, and hidden states come in; before the last
    there is no head, and hidden states go out.
    """

    rope_table: Tensor

    def __init__(
        self,
        config: LlamaConfig,
        embedding: nn.Module | None,
        blocks: Sequence[Block],
        norm: Tensor | None,
        head: nn.Module | None,
        first_layer: int = 0,
    ):
        """Assemble built parts; `norm` is the final norm's weight [D]. `first_layer`: the number of the first block."""
        super().__init__()
        self.config = config
        self.operations = blocks[0].operations
        self.first_layer = first_layer
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = None if norm is None else RMSNorm(norm, config.norm_eps)
        self.head = head
        device = blocks[0].attention_norm.weight.device
        self.register_buffer("rope_table", rope_table(config).to(device), persistent=False)

    def forward(
        self,
        tokens_BT: Tensor,
        start_B: Tensor | None,
        cache: KVCache,
        last_B: Tensor | None = None,
        show: Show | None = None,
    ) -> Tensor:
        """Logits [B, T, V] in float32, or [B, 1, V] at index `last_B` of each row alone; of a stage before the last hidden
        states [B, T, D]. Behind the first stage `tokens_BT` are those of the stage before.

        Row b's token t stands at position start_B[b] + t and sees every position up to its own in the cache. A start of None
        means position 0 with nothing before. `show` is given every stage by its name ("layers.3.q_rope"), to look at at once:
        its memory may be written over.
        """
        step = self.operations.place(self.rope_table, tokens_BT, start_B, cache)
        step = step if show is None else step._replace(show=show)
        x_BTD = self.operations.embed(tokens_BT, self.embedding)
        if self.embedding is not None:
            step.see(embedding=x_BTD)
        for i, (block, layer) in enumerate(zip(self.blocks, cache.layers), self.first_layer):
            of_block = step.part(f"layers.{i}")
            x_BTD = block(x_BTD, layer, of_block)
            of_block.see_part(x_BTD)
        if self.head is None or self.norm is None:
            return x_BTD
        if last_B is not None:
            x_BTD = x_BTD[torch.arange(len(x_BTD), device=last_B.device), last_B][:, None]
        return self.operations.head(x_BTD, self.norm, self.head, step)

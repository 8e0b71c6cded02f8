"""The same Llama, arranged to be fast: a cache and a position come in, so a token costs one pass over the weights.

A second derivation of the arithmetic of `llama_ref.model`: rotary pairs are turned by real cosines and sines instead of
complex numbers, attention is PyTorch's fused one over cached keys, projections may be joined. `projections`, the
matrices' arithmetic, and `all_reduce`, the sum over processes, are arguments; the blocks do not know what either is.

Shapes: B batch, T tokens, S cache slots, D model width, H query heads, K key/value heads, d head width, F hidden width,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.contracts import AllReduce, KVCache, LayerCache
from llama_fast.model.attention import attend
from llama_ref.config import LlamaConfig, RopeScaling

Observer = Callable[[str, Tensor], None]


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # float32: a bf16 sum of squares over 4096 terms has two digits
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class Separate(nn.Module):
    """Several projections of one input, each its own product."""

    def __init__(self, linears: Sequence[nn.Module]):
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.linears)


class Joined(nn.Module):
    """Several projections of one input as one product, cut apart afterwards."""

    def __init__(self, linear: nn.Module, sizes: Sequence[int]):
        super().__init__()
        self.linear = linear
        self.sizes = list(sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.linear(x).split(self.sizes, -1))


class SplitHead(nn.Module):
    """A head that holds some rows of the vocabulary; `gather` makes all logits [..., V] of these [..., rows held]."""

    def __init__(self, linear: nn.Module, gather: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear = linear
        self.gather = gather

    def forward(self, x: Tensor) -> Tensor:
        return self.gather(self.linear(x))


class Biased(nn.Module):
    """A linear module's product plus a vector [out]."""

    def __init__(self, linear: nn.Module, bias: Tensor):
        super().__init__()
        self.linear = linear
        self.bias = nn.Buffer(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.bias  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and the gated feed-forward, each added to the residual stream.

    `projections` holds the modules qkv, wo, gate_up and w2; `norms` the two weights [D].
    """

    def __init__(
        self,
        config: LlamaConfig,
        norms: Mapping[str, Tensor],
        projections: Mapping[str, nn.Module],
        all_reduce: AllReduce,
    ):
        super().__init__()
        self.config = config
        self.all_reduce = all_reduce
        self.attention_norm = RMSNorm(norms["attention_norm"], config.norm_eps)
        self.ffn_norm = RMSNorm(norms["ffn_norm"], config.norm_eps)
        self.qkv = projections["qkv"]
        self.wo = projections["wo"]
        self.gate_up = projections["gate_up"]
        self.w2 = projections["w2"]

    def forward(
        self,
        x_BTD: Tensor,
        turns_BTd2: Tensor,
        position_BT: Tensor,
        mask_B1TS: Tensor | None,
        cache: LayerCache,
        observe: Observer | None = None,
        name: str = "",
    ) -> Tensor:
        """The residual stream after this block; `mask_B1TS` None means causal among these T tokens alone."""
        x_BTD = x_BTD + self.all_reduce(self.attention(x_BTD, turns_BTd2, position_BT, mask_B1TS, cache, observe, name))
        return x_BTD + self.all_reduce(self.feed_forward(x_BTD, observe, name))

    def attention(
        self,
        x_BTD: Tensor,
        turns_BTd2: Tensor,
        position_BT: Tensor,
        mask_B1TS: Tensor | None,
        cache: LayerCache,
        observe: Observer | None,
        name: str,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        d = self.config.head_dim
        n_BTD = self.attention_norm(x_BTD)
        q_BTHd, k_BTKd, v_BTKd = (part.view(B, T, -1, d) for part in self.qkv(n_BTD))
        if observe is not None:
            see(observe, name, attention_norm=n_BTD, q=q_BTHd, k=k_BTKd, v=v_BTKd)
        q_BTHd, k_BTKd = rotate(q_BTHd, turns_BTd2), rotate(k_BTKd, turns_BTd2)
        k_BKSd, v_BKSd = cache.write(k_BTKd, v_BTKd, position_BT)
        if mask_B1TS is None:
            k_BKSd, v_BKSd = k_BTKd.transpose(1, 2), v_BTKd.transpose(1, 2)
        a_BTHd = attend(q_BTHd, k_BKSd, v_BKSd, mask_B1TS)
        o_BTD = self.wo(a_BTHd.reshape(B, T, -1))
        if observe is not None:
            see(observe, name, q_rope=q_BTHd, k_rope=k_BTKd, attention=a_BTHd, attention_out=o_BTD)
        return o_BTD  # type: ignore[no-any-return]

    def feed_forward(self, x_BTD: Tensor, observe: Observer | None, name: str) -> Tensor:
        n_BTD = self.ffn_norm(x_BTD)
        gate_BTF, up_BTF = self.gate_up(n_BTD)
        hidden_BTF = F.silu(gate_BTF) * up_BTF
        down_BTD = self.w2(hidden_BTF)
        if observe is not None:
            see(observe, name, ffn_norm=n_BTD, ffn_hidden=hidden_BTF, ffn_out=down_BTD)
        return down_BTD  # type: ignore[no-any-return]


class Llama(nn.Module):
    """Tokens and their positions in, logits out; keys and values are kept in the cache that is passed."""

    rope_table: Tensor

    def __init__(
        self, config: LlamaConfig, embedding: nn.Module, blocks: Sequence[Block], norm: Tensor, head: nn.Module
    ):
        """Assemble built parts; `norm` is the final norm's weight [D]."""
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(norm, config.norm_eps)
        self.head = head
        self.register_buffer("rope_table", rope_table(config).to(norm.device), persistent=False)

    def forward(
        self,
        tokens_BT: Tensor,
        start_B: Tensor | None,
        cache: KVCache,
        last_B: Tensor | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Logits [B, T, V] in float32, or [B, 1, V] at index `last_B` of each row alone.

        Row b's token t stands at position start_B[b] + t and sees every position up to its own in the cache. A start
        of None means position 0 with nothing before: attention then stays among these tokens, and causal.
        """
        B, T = tokens_BT.shape
        step_1T = torch.arange(T, device=tokens_BT.device)[None, :]
        position_BT = step_1T.expand(B, T) if start_B is None else start_B[:, None] + step_1T
        mask_B1TS, window = None, self.config.window
        if start_B is not None or (window is not None and window < T):
            slot_S = torch.arange(cache.length, device=tokens_BT.device)
            mask_BTS = slot_S <= position_BT[:, :, None]
            if window is not None:
                mask_BTS &= slot_S > position_BT[:, :, None] - window
            mask_B1TS = mask_BTS[:, None]
        turns_BTd2 = self.rope_table[position_BT]
        x_BTD = self.embedding(tokens_BT)
        if observe is not None:
            observe("embedding", x_BTD)
        for i, (block, layer) in enumerate(zip(self.blocks, cache.layers, strict=True)):
            if observe is None:
                x_BTD = block(x_BTD, turns_BTd2, position_BT, mask_B1TS, layer)
            else:
                x_BTD = block(x_BTD, turns_BTd2, position_BT, mask_B1TS, layer, observe, f"layers.{i}")
                observe(f"layers.{i}", x_BTD)
        if last_B is not None:
            x_BTD = x_BTD[torch.arange(B, device=last_B.device), last_B][:, None]
        n_BTD = self.norm(x_BTD)
        # float32, so that whoever compares, samples or takes the argmax sees the same numbers: a compiler that fuses the
        # argmax into the head would else choose by digits that bf16 logits no longer show
        logits_BTV = self.head(n_BTD).float()
        if observe is not None:
            observe("norm", n_BTD)
            observe("logits", logits_BTV)
        return logits_BTV  # type: ignore[no-any-return]


def see(observe: Observer, name: str, **stages: Tensor) -> None:
    """Show the stages of a block under the reference's names: `see(f, "layers.3", q=q)` calls f("layers.3.q", q)."""
    for stage, value in stages.items():
        observe(f"{name}.{stage}", value)


def rope_table(config: LlamaConfig) -> Tensor:
    """Cosine and sine of every position's angles, float32 [max_context, d/2, 2], from float64 angles.

    Float32 is a must: in bf16 neighbouring positions beyond a few hundred would share an angle. With YaRN both are longer
    than a unit vector's, which sharpens the attention between a rotated q and a rotated k.
    """
    exponent = torch.arange(config.head_dim // 2, dtype=torch.float64) * (2 / config.head_dim)
    frequency = torch.exp(-exponent * math.log(config.rope_theta))
    radius = 1.0
    if config.rope_scaling is not None:
        frequency, radius = stretch(frequency, config.rope_scaling)
    angle = torch.outer(torch.arange(config.max_context, dtype=torch.float64), frequency)
    return torch.stack([angle.cos() * radius, angle.sin() * radius], -1).float()


def stretch(frequency: Tensor, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Frequencies for a longer context, and the length of the rotated vectors.

    "linear" slows every pair by the factor. "llama3" sorts pairs by wavelength: short ones stay, long ones are slowed,
    those between go smoothly from one to the other (Llama 3.1's published rule). "yarn" does so by the pair's place
    between two borders. "dynamic" leaves the trained context as it is, and no model here goes beyond.
    """
    slowed = frequency / scaling.factor
    if scaling.kind == "dynamic":
        return frequency, 1.0
    if scaling.kind == "linear":
        return slowed, 1.0
    if scaling.kind == "yarn":
        share = yarn_slowed(frequency, scaling)
        sharper = scaling.attention_factor or 1 + math.log(scaling.factor) / 10
        return torch.lerp(frequency, slowed, share), sharper
    wavelength = 2 * math.pi / frequency
    longest_kept = scaling.original_context / scaling.high_freq_factor
    shortest_slowed = scaling.original_context / scaling.low_freq_factor
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = torch.lerp(slowed, frequency, smooth)
    long = torch.where(wavelength > shortest_slowed, slowed, between)
    return torch.where(wavelength < longest_kept, frequency, long), 1.0


def yarn_slowed(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """How far each pair is slowed, 0 to 1: a straight line between two borders on the scale of pairs.

    Frequencies fall by a constant ratio from pair to pair, so the (fractional) pair whose wavelength fits n times into
    the original context is found by a logarithm to that ratio.
    """
    pairs = frequency.shape[0]
    log_ratio = math.log(frequency[0] / frequency[1])

    def border(times: float) -> float:
        return math.log(scaling.original_context / (times * 2 * math.pi)) / log_ratio

    low, high = border(scaling.beta_fast), border(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001  # as published: a step instead of a ramp
    return torch.tensor([min(max((pair - low) / (high - low), 0.0), 1.0) for pair in range(pairs)]).to(frequency)


def rotate(x_BThd: Tensor, turns_BTd2: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, a sin + b cos) for each pair of a head, in float32."""
    cos, sin = turns_BTd2[:, :, None, :, 0], turns_BTd2[:, :, None, :, 1]
    a, b = x_BThd.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x_BThd)

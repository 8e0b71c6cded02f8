"""What a Llama is: tokens in, logits for every position out. No cache, no fusion, nothing clever.

Shapes: B batch, T tokens, D model width, H query heads, K key/value heads, d head width, F hidden width, V vocabulary.

Weights keep their stored type and are cast on use, so the same few lines give the float64 truth and the yardstick of any
smaller type. Three islands are computed in float32 even when `dtype` is smaller (float64 stays float64): the RMS norm,
the rotary embedding and the softmax. Everything else is computed and rounded in `dtype`.

Sources: Touvron et al. 2023 (Llama, Llama 2); Su et al. 2021 (RoPE); Zhang & Sennrich 2019 (RMSNorm);
Shazeer 2020 (SwiGLU); Ainslie et al. 2023 (grouped-query attention).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llama_ref.checkpoint import TensorSource
from llama_ref.config import LlamaConfig, RopeScaling

Observer = Callable[[str, Tensor], None]

PARTS = (
    *("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    *("ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
"""The weights of a block, in the order of the forward pass."""


def _ignore(stage: str, value: Tensor) -> None:
    """The default observer: sees every stage, keeps none."""


class Llama:
    """A Llama evaluated by definition: `Llama(config, weights, torch.float64)(tokens_BT) -> logits_BTV`."""

    def __init__(self, config: LlamaConfig, weights: Mapping[str, TensorSource], dtype: torch.dtype):
        """Hold (not copy) `weights` under canonical names; `dtype` is the type of the arithmetic and of the logits."""
        self.config = config
        self.dtype = dtype
        self._weights = weights

    def __call__(self, tokens_BT: Tensor, observe: Observer = _ignore) -> Tensor:
        """Logits [B, T, V] in `dtype` for tokens at positions 0..T-1; `observe(name, value)` sees every stage.

        Rows shorter than T are padded on the right: causality keeps padding from reaching the tokens before it.
        """
        _, T = tokens_BT.shape
        if self.config.max_context < T:
            raise ValueError(f"{T} tokens do not fit the model's context of {self.config.max_context}")
        x_BTD = self._weight("tok_embeddings.weight", tokens_BT.device)[tokens_BT]
        observe("embedding", x_BTD)
        for layer in range(self.config.n_layers):
            x_BTD = self.block(layer, x_BTD, observe)
        x_BTD = rms_norm(x_BTD, self._weight("norm.weight", x_BTD.device), self.config.norm_eps)
        observe("norm", x_BTD)
        head = "tok_embeddings.weight" if self.config.tie_embeddings else "output.weight"
        logits_BTV = x_BTD @ self._weight(head, x_BTD.device).T
        observe("logits", logits_BTV)
        return logits_BTV

    def block(self, layer: int, x_BTD: Tensor, observe: Observer = _ignore) -> Tensor:
        """One transformer block: attention, then the gated feed-forward, each added to the residual stream."""
        name = f"layers.{layer}"
        weight = {part: self._weight(f"{name}.{part}.weight", x_BTD.device) for part in PARTS}
        bias = {
            part: self._weight(f"{name}.{part}.bias", x_BTD.device)
            for part in PARTS
            if f"{name}.{part}.bias" in self._weights
        }
        B, T, _ = x_BTD.shape
        H, K, d = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim

        n_BTD = rms_norm(x_BTD, weight["attention_norm"], self.config.norm_eps)
        observe(f"{name}.attention_norm", n_BTD)
        q_BTHd = project(n_BTD, weight, bias, "attention.wq").view(B, T, H, d)
        k_BTKd = project(n_BTD, weight, bias, "attention.wk").view(B, T, K, d)
        v_BTKd = project(n_BTD, weight, bias, "attention.wv").view(B, T, K, d)
        observe(f"{name}.q", q_BTHd)
        observe(f"{name}.k", k_BTKd)
        observe(f"{name}.v", v_BTKd)
        turns_Td = rotations(self.config, T, island(self.dtype), x_BTD.device)
        q_BTHd, k_BTKd = rotate(q_BTHd, turns_Td), rotate(k_BTKd, turns_Td)
        observe(f"{name}.q_rope", q_BTHd)
        observe(f"{name}.k_rope", k_BTKd)
        a_BTHd = attend(q_BTHd, k_BTKd, v_BTKd, self.config.window)
        observe(f"{name}.attention", a_BTHd)
        o_BTD = project(a_BTHd.reshape(B, T, H * d), weight, bias, "attention.wo")
        observe(f"{name}.attention_out", o_BTD)
        x_BTD = x_BTD + o_BTD

        n_BTD = rms_norm(x_BTD, weight["ffn_norm"], self.config.norm_eps)
        observe(f"{name}.ffn_norm", n_BTD)
        gate_BTF = project(n_BTD, weight, bias, "feed_forward.w1")
        up_BTF = project(n_BTD, weight, bias, "feed_forward.w3")
        hidden_BTF = gate_BTF * torch.sigmoid(gate_BTF) * up_BTF
        observe(f"{name}.ffn_hidden", hidden_BTF)
        down_BTD = project(hidden_BTF, weight, bias, "feed_forward.w2")
        observe(f"{name}.ffn_out", down_BTD)
        x_BTD = x_BTD + down_BTD
        observe(name, x_BTD)
        return x_BTD

    def _weight(self, name: str, device: torch.device) -> Tensor:
        return self._weights[name][:].to(device=device, dtype=self.dtype)


def project(x: Tensor, weight: Mapping[str, Tensor], bias: Mapping[str, Tensor], part: str) -> Tensor:
    """x [..., in] @ W^T, plus the part's bias [out] if it has one."""
    y = x @ weight[part].T
    return y + bias[part] if part in bias else y


def island(dtype: torch.dtype) -> torch.dtype:
    """The type of the islands: float32, or float64 where everything is float64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the quotient in float32, the product in x's type."""
    wide = x.to(island(x.dtype))
    return (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Radians per position of each rotary pair, float64 [d/2]: theta^(-2i/d), rescaled where the config says so."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    frequency = config.rope_theta ** (-pairs / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "dynamic":  # which changes nothing within the context, and we end there
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    # 0: a slow pair, divided by the factor; 1: a fast pair, kept
    keep = _kept_llama3(frequency, scaling) if scaling.kind == "llama3" else _kept_yarn(config, scaling)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def _kept_llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """A ramp in the number of turns within the original context, between two numbers of turns."""
    turns_in_context = scaling.original_context * frequency / (2 * math.pi)
    ramp = (turns_in_context - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return ramp.clamp(0, 1)


def _kept_yarn(config: LlamaConfig, scaling: RopeScaling) -> Tensor:
    """A ramp in the pair's number, between the pairs that turn `beta_fast` and `beta_slow` times within the context.

    Pair i turns L theta^(-2i/d) / 2 pi times, so that n turns belong to i = d ln(L / 2 pi n) / (2 ln theta).
    """
    d = config.head_dim

    def pair_turning(times: float) -> float:
        return d * math.log(scaling.original_context / (2 * math.pi * times)) / (2 * math.log(config.rope_theta))

    first, last = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    width = last - first or 0.001  # as published, where the two fall together
    return 1 - ((torch.arange(d // 2, dtype=torch.float64) - first) / width).clamp(0, 1)


def amplitude(config: LlamaConfig) -> float:
    """By what rotated q and k are multiplied besides: YaRN sharpens attention by it; 1 for every other kind."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1 if scaling.attention_factor is None else scaling.attention_factor


def rotations(config: LlamaConfig, length: int, real_dtype: torch.dtype, device: torch.device) -> Tensor:
    """amplitude * exp(i * position * frequency), complex [length, d/2]: in float64, rounded once to `real_dtype`."""
    angle_Td = torch.outer(torch.arange(length, dtype=torch.float64), inverse_frequencies(config))
    unit = torch.polar(torch.full_like(angle_Td, amplitude(config)), angle_Td)
    return unit.to(torch.complex128 if real_dtype is torch.float64 else torch.complex64).to(device)


def rotate(x_BThd: Tensor, turns_Td: Tensor) -> Tensor:
    """Turn each pair (2i, 2i+1) of a head, read as a complex number, by its position's angle."""
    wide = x_BThd.to(island(x_BThd.dtype))
    pairs = torch.view_as_complex(wide.reshape(*wide.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns_Td[:, None, :]).flatten(-2).to(x_BThd.dtype)


def attend(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over positions not after one's own, with a window over the last `window` of them.

    Query head h reads kv head h // (H / K).
    """
    T, H, d = q_BTHd.shape[1:]
    share = H // k_BTKd.shape[2]
    k_BTHd = k_BTKd.repeat_interleave(share, dim=2)
    v_BTHd = v_BTKd.repeat_interleave(share, dim=2)
    score_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHd, k_BTHd).to(island(q_BTHd.dtype)) / math.sqrt(d)
    unseen_TS = torch.ones(T, T, dtype=torch.bool, device=q_BTHd.device).triu(1)
    if window is not None:
        unseen_TS |= torch.ones_like(unseen_TS).tril(-window)
    weight_BHTS = score_BHTS.masked_fill(unseen_TS, -math.inf).softmax(-1).to(q_BTHd.dtype)
    return torch.einsum("bhts,bshd->bthd", weight_BHTS, v_BTHd)

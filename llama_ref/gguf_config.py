"""LlamaConfig from the metadata of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llama_ref.config import LlamaConfig
from llama_ref.fields import as_ids, even_share, required, stated
from llama_ref.rope_scaling import RopeScaling


def from_gguf(
    metadata: Mapping[str, Any],
    *,
    tie_embeddings: bool,
    rope_factors: Sequence[float] | None = None,
    attention_bias: bool = False,
    mlp_bias: bool = False,
) -> LlamaConfig:
    """From GGUF metadata, plus the facts that GGUF states by its tensors.

    `tie_embeddings`: the file has no `output.weight`; the biases: it has such tensors. `rope_factors`: its tensor
    `rope_freqs.weight`, by which llama.cpp divides the frequencies; it must be the llama-3 rule with its published
    constants.
    """
    _refuse_unsupported_gguf(metadata)
    dim = required(metadata, "llama.embedding_length")
    n_heads = _gguf_uniform(metadata, "llama.attention.head_count")
    if n_heads is None:
        raise ValueError("llama.attention.head_count is missing")
    stated_head_dim = metadata.get("llama.attention.key_length", metadata.get("llama.rope.dimension_count"))
    head_dim = stated(stated_head_dim, None) or even_share(
        dim, n_heads, "llama.embedding_length", "llama.attention.head_count"
    )
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if metadata.get(name, head_dim) != head_dim:
            raise ValueError(f"{name}={metadata[name]} differs from the head dimension {head_dim}: not supported")
    theta = float(metadata.get("llama.rope.freq_base", 10000.0))
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return LlamaConfig(
        dim=dim,
        n_layers=required(metadata, "llama.block_count"),
        n_heads=n_heads,
        n_kv_heads=stated(_gguf_uniform(metadata, "llama.attention.head_count_kv"), n_heads),
        head_dim=head_dim,
        ffn_dim=stated(_gguf_uniform(metadata, "llama.feed_forward_length"), 0),
        vocab_size=metadata.get("llama.vocab_size", len(tokens)),
        max_context=required(metadata, "llama.context_length"),
        norm_eps=float(required(metadata, "llama.attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=_gguf_rope_scaling(metadata, theta, head_dim, rope_factors),
        tie_embeddings=tie_embeddings,
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=as_ids([token for token in ends if token is not None]),
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    )


def llama3_rope_factors(scaling: RopeScaling, theta: float, head_dim: int) -> list[float]:
    """By what each of the head_dim / 2 frequencies is divided, as GGUF stores it in `rope_freqs.weight`.

    A fact about a file, used to recognise it; the models derive the angles on their own.
    """
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)  # in positions
        if wavelength < scaling.original_context / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > scaling.original_context / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return factors


def _refuse_unsupported_gguf(metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture={architecture!r} is not a Llama")
    for name in ("llama.expert_count", "llama.attention.sliding_window"):
        if metadata.get(name):
            raise ValueError(f"{name}={metadata[name]} is not supported")


def _gguf_uniform(metadata: Mapping[str, Any], name: str) -> int | None:
    """A number that GGUF may also state per layer, where all layers must agree: [9, 9, 9] -> 9."""
    value = metadata.get(name)
    if value is None or isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{name} differs between layers ({sorted(set(value))}): not supported")
    return int(value[0])


def _gguf_rope_scaling(
    metadata: Mapping[str, Any], theta: float, head_dim: int, factors: Sequence[float] | None
) -> RopeScaling | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    linear = float(metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear", 1.0)))
    if kind not in ("none", "linear"):
        raise ValueError(f"llama.rope.scaling.type={kind!r} is not supported (known: none, linear)")
    stretched = kind == "linear" or "llama.rope.scale_linear" in metadata
    if factors is None:
        return RopeScaling("linear", linear) if stretched and linear != 1.0 else None
    if stretched and linear != 1.0:
        raise ValueError("llama.rope.scaling.type='linear' together with rope_freqs.weight is not supported")
    if max(factors) == 1.0:
        return None
    scaling = RopeScaling("llama3", float(max(factors)))
    if len(factors) != head_dim // 2:
        raise ValueError(f"rope_freqs.weight holds {len(factors)} factors for a head dimension of {head_dim}")
    expected = llama3_rope_factors(scaling, theta, head_dim)
    if any(abs(found - wanted) > 1e-4 * wanted for found, wanted in zip(factors, expected)):
        raise ValueError("rope_freqs.weight does not follow the llama-3 rule: not supported")
    return scaling

"""LlamaConfig from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_ref.config import LlamaConfig
from llama_ref.formats.fields import even_share, flag, number, whole
from llama_ref.formats.gguf_rope import gguf_rope_scaling
from llama_ref.formats.gguf_vocabulary import TOKENS, end_ids, role_id, warn_of_ids

REFUSED = ("llama.expert_count", "llama.attention.sliding_window", "llama.attention.clamp_kqv")
WIDTHS = ("llama.attention.key_length", "llama.rope.dimension_count")  # of a head; the first that is there
SCALES = ("llama.logit_scale", "llama.residual_scale", "llama.embedding_scale", "llama.attention.scale")


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
    dim = whole(metadata, "llama.embedding_length")
    n_heads = _uniform(metadata, "llama.attention.head_count")
    width = next((name for name in WIDTHS if name in metadata), None)
    if width is None or metadata[width] == 0:
        head_dim = even_share(dim, n_heads, "llama.embedding_length", "llama.attention.head_count")
    else:
        head_dim = whole(metadata, width)
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if metadata.get(name, head_dim) != head_dim:
            raise ValueError(f"{name}={metadata[name]} differs from the head dimension {head_dim}: not supported")
    theta = number(metadata, "llama.rope.freq_base", 10000.0)
    tokens = metadata.get(TOKENS, [])
    if not isinstance(tokens, list):
        raise ValueError(f"{TOKENS}={tokens!r:.80} must be an array")
    vocab_size = whole(metadata, "llama.vocab_size", len(tokens) or None)
    warn_of_ids(metadata, vocab_size)
    return LlamaConfig(
        dim=dim,
        n_layers=whole(metadata, "llama.block_count"),
        n_heads=n_heads,
        n_kv_heads=_uniform(metadata, "llama.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ffn_dim=_uniform(metadata, "llama.feed_forward_length"),
        vocab_size=vocab_size,
        max_context=whole(metadata, "llama.context_length"),
        norm_eps=number(metadata, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=gguf_rope_scaling(metadata, theta, head_dim, rope_factors),
        tie_embeddings=tie_embeddings,
        bos_id=role_id(metadata, "bos", vocab_size),
        eos_ids=end_ids(metadata, vocab_size),
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    )


def _refuse_unsupported_gguf(metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture={architecture!r} is not a Llama")
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"general.type={kind!r} is no model")
    for name in REFUSED:
        if metadata.get(name):
            raise ValueError(f"{name}={metadata[name]} is not supported")
    for name in SCALES:
        if metadata.get(name) not in (None, 0, 1):  # 0: as if it were not there
            raise ValueError(f"{name}={metadata[name]} is not supported: a Llama has no such scale")
    if not flag(metadata, "llama.attention.causal", True):
        raise ValueError("llama.attention.causal=False is not supported")


def _uniform(metadata: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A count that GGUF may also state per layer, where all layers must agree: [9, 9, 9] -> 9."""
    value = metadata.get(name)
    if not isinstance(value, list):
        return whole(metadata, name, default)
    counts = {whole({name: count}, name) for count in value}
    if len(counts) != 1:
        raise ValueError(f"{name} differs between layers ({sorted(counts)}): not supported")
    return counts.pop()

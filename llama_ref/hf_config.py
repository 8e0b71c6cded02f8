"""LlamaConfig from and to the content of a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_ref.config import LlamaConfig
from llama_ref.fields import as_ids, even_share, required, stated
from llama_ref.rope_scaling import hf_rope_scaling, hf_rope_spelling

_HF_CONTEXT = {"llama": 2048, "mistral": 131072}  # model_type -> max_position_embeddings where a file does not say


def from_hf(data: Mapping[str, Any]) -> LlamaConfig:
    """From the content of a Hugging Face `config.json`; absent fields take LlamaConfig's published defaults.

    The shape itself has no default: a file without `hidden_size` is refused. Raises ValueError, one line that
    names the field.
    """
    _refuse_unsupported_hf(data)
    dim, n_heads = required(data, "hidden_size"), required(data, "num_attention_heads")
    head_dim = data.get("head_dim")
    if head_dim is None:
        head_dim = even_share(dim, n_heads, "hidden_size", "num_attention_heads")
    rope: Mapping[str, Any] = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_scaling={rope!r} must be an object")
    theta = rope.get("rope_theta", data.get("rope_theta"))
    max_context = stated(data.get("max_position_embeddings"), _HF_CONTEXT[data["model_type"]])
    window = _hf_window(data)
    return LlamaConfig(
        dim=dim,
        n_layers=required(data, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=stated(data.get("num_key_value_heads"), n_heads),
        head_dim=head_dim,
        ffn_dim=required(data, "intermediate_size"),
        vocab_size=required(data, "vocab_size"),
        max_context=max_context,
        norm_eps=float(stated(data.get("rms_norm_eps"), 1e-6)),
        rope_theta=float(stated(theta, 10000.0)),
        rope_scaling=hf_rope_scaling(rope, max_context),
        tie_embeddings=bool(data.get("tie_word_embeddings", False)),
        bos_id=data.get("bos_token_id", 1),
        eos_ids=as_ids(data.get("eos_token_id", 2)),
        attention_bias=bool(data.get("attention_bias")),
        mlp_bias=bool(data.get("mlp_bias")),
        window=None if window is None or window >= max_context else window,
    )


def to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The content of an equivalent Hugging Face `config.json`: `from_hf(to_hf(c)) == c`."""
    # a window is a field of Mistral's, whose biases and mask are otherwise Llama's
    family: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if config.window is not None:
        family = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": config.window}
    return {
        **family,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else hf_rope_spelling(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _refuse_unsupported_hf(data: Mapping[str, Any]) -> None:
    model_type = data.get("model_type")
    if model_type not in _HF_CONTEXT:
        raise ValueError(f"model_type={model_type!r} is not a Llama (supported: {', '.join(_HF_CONTEXT)})")
    mistral = model_type == "mistral"
    wanted: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("hidden_act", data.get("hidden_act", "silu"), ("silu", "swish")),
        ("attention_bias", data.get("attention_bias"), (None, False) if mistral else (None, False, True)),
        ("mlp_bias", data.get("mlp_bias"), (None, False) if mistral else (None, False, True)),
        ("sliding_window", None if mistral else data.get("sliding_window"), (None,)),
        ("partial_rotary_factor", data.get("partial_rotary_factor"), (None, 1, 1.0)),
        ("quantization_config", data.get("quantization_config"), (None,)),
    ]
    for name, value, allowed in wanted:
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not supported")
    only = "full_attention" if _hf_window(data) is None else "sliding_attention"
    for kind in data.get("layer_types") or ():
        if kind != only:
            raise ValueError(f"layer_types holds {kind!r}: only {only} in every layer is supported")


def _hf_window(data: Mapping[str, Any]) -> int | None:
    """Mistral's own default is a window of 4096: only an explicit null switches it off."""
    if data["model_type"] != "mistral" or data.get("use_sliding_window") is False:
        return None
    window: int | None = data.get("sliding_window", 4096)
    return window

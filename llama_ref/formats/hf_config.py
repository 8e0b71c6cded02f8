"""LlamaConfig from and to the content of a Hugging Face `config.json`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from llama_ref.config import LlamaConfig
from llama_ref.formats.fields import as_ids, even_share, flag, number, whole
from llama_ref.formats.hf_rope import hf_rope, hf_rope_spelling

QUANTIZED = ("quantization_config", "compression_config", "quantization")  # by transformers, its plug-ins, and MLX
_HF_CONTEXT = {"llama": 2048, "mistral": 131072}  # model_type -> max_position_embeddings where a file does not say
MISTRAL_WINDOW = 4096


def from_hf(data: Mapping[str, Any], where: object = "config.json") -> LlamaConfig:
    """From the content of a Hugging Face `config.json`; absent fields take LlamaConfig's published defaults.

    The shape itself has no default: a file without `hidden_size` is refused. Raises ValueError, one line that
    names the field. What the file states and is not read is said in a warning that names the file as `where`.
    """
    _refuse_unsupported_hf(data)
    dim, n_heads = whole(data, "hidden_size"), whole(data, "num_attention_heads")
    max_context = whole(data, "max_position_embeddings", _HF_CONTEXT[data["model_type"]])
    theta, scaling = hf_rope(data, max_context, where)
    window = _hf_window(data, where)
    # null means as many as heads; absence means the family's own default
    kv_heads = 8 if data["model_type"] == "mistral" and "num_key_value_heads" not in data else n_heads
    vocab_size = whole(data, "vocab_size")
    head_dim = data.get("head_dim")
    if head_dim is None:
        head_dim = even_share(dim, n_heads, "hidden_size", "num_attention_heads")
    return LlamaConfig(
        dim=dim,
        n_layers=whole(data, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=whole(data, "num_key_value_heads", kv_heads),
        head_dim=whole(data, "head_dim", head_dim),
        ffn_dim=whole(data, "intermediate_size"),
        vocab_size=vocab_size,
        max_context=max_context,
        norm_eps=number(data, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=flag(data, "tie_word_embeddings"),
        bos_id=_bos_id(data, vocab_size, where),
        eos_ids=ids_within(as_ids(data.get("eos_token_id", 2)), "eos_token_id", vocab_size, where),
        attention_bias=flag(data, "attention_bias"),
        mlp_bias=flag(data, "mlp_bias"),
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
    if not isinstance(model_type, str) or model_type not in _HF_CONTEXT:
        raise ValueError(f"model_type={model_type!r:.80} is not a Llama (supported: {', '.join(_HF_CONTEXT)})")
    if data.get("hidden_act") not in (None, "silu", "swish"):
        raise ValueError(f"hidden_act={data['hidden_act']!r:.80} is not supported")
    for name in QUANTIZED:
        stated = data.get(name)
        if stated is not None:
            if isinstance(stated, Mapping) and "quant_method" in stated:  # the first to be seen where the line ends
                stated = {"quant_method": stated["quant_method"], **stated}
            raise ValueError(f"{name}={stated!r:.80} is not supported")
    for name in ("attention_bias", "mlp_bias"):
        if flag(data, name) and model_type == "mistral":
            raise ValueError(f"{name}=True is not supported in a mistral")
    _refuse_mixed_layers(data)


def _refuse_mixed_layers(data: Mapping[str, Any]) -> None:
    kinds = data.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise ValueError(f"layer_types={kinds!r:.80} must be a list")
    windowed = data["model_type"] == "mistral" and data.get("sliding_window", MISTRAL_WINDOW) is not None
    only = "sliding_attention" if windowed else "full_attention"
    for kind in kinds or ():
        if kind != only:
            raise ValueError(f"layer_types holds {kind!r:.80}: only {only} in every layer is supported")


def _hf_window(data: Mapping[str, Any], where: object) -> int | None:
    """A window is Mistral's, whose own default is one of 4096: only an explicit null switches it off."""
    wanted = flag(data, "use_sliding_window", True)
    if data["model_type"] == "mistral":
        if "sliding_window" in data and data["sliding_window"] is None:
            return None
        window = whole(data, "sliding_window", MISTRAL_WINDOW)
        if not wanted:  # a field of Qwen's: transformers does not look at it here
            warnings.warn(f"{where}: a mistral has no use_sliding_window; its window is {window}", stacklevel=3)
        return window
    if data.get("sliding_window") is not None and wanted:
        window = whole(data, "sliding_window")
        if window < whole(data, "max_position_embeddings", _HF_CONTEXT["llama"]):
            raise ValueError(f"sliding_window={window} is not supported in a llama")
    return None


def ids_within(ids: tuple[int, ...], name: str, size: int, where: object) -> tuple[int, ...]:
    """The ids of a vocabulary of `size` tokens; others, as -1 for none, no model can produce, and a warning names them."""
    outside = [token for token in ids if not 0 <= token < size]
    if outside:
        warnings.warn(f"{where}: {name} {outside[0]} is outside the vocabulary of {size}: ignored", stacklevel=3)
    return tuple(token for token in ids if token not in outside)


def _bos_id(data: Mapping[str, Any], size: int, where: object) -> int | None:
    ids = as_ids(data.get("bos_token_id", 1), "bos_token_id")
    if len(ids) > 1 or isinstance(data.get("bos_token_id"), list):
        raise ValueError(f"bos_token_id={data['bos_token_id']!r:.80} must be one token id")
    ids = ids_within(ids, "bos_token_id", size, where)
    return ids[0] if ids else None

"""LlamaConfig from and to the content of Meta's `params.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_ref.config import LlamaConfig
from llama_ref.formats.fields import even_share, flag, number, stated, whole
from llama_ref.rope_scaling import RopeScaling

LLAMA_3_VOCABULARY = 128256
LLAMA_3_2 = ((2048, 16), (3072, 28))  # dim and n_layers of its models of 1B and 3B
_META_FIELDS = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"),
    *("rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "max_seq_len", "max_batch_size"),
    *("head_dim", "hidden_dim", "sliding_window"),  # Mistral's
}


def from_meta(
    params: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    max_context: int | None = None,
    tie_embeddings: bool = False,
) -> LlamaConfig:
    """From Meta's `params.json`. It does not state the context, nor (as -1, in Llama 2) the vocabulary's size.

    The width of the feed-forward layer follows Meta's own rule: two thirds of 4 x dim, times
    `ffn_dim_multiplier`, rounded up to `multiple_of`: (4096, multiple_of=256) -> 11008. Mistral's files of the same
    name state it as `hidden_dim`, and may state `head_dim` and `sliding_window`. `max_context` None is what the
    family was published with, told by norm_eps, rope_theta and the vocabulary as the published conversion does.
    """
    unknown = [name for name, value in params.items() if name not in _META_FIELDS and value]
    if unknown:
        raise ValueError(f"{unknown[0]}={params[unknown[0]]!r} is not supported")
    dim, n_heads = whole(params, "dim"), whole(params, "n_heads")
    vocab = params.get("vocab_size")
    if vocab in (None, -1):
        if vocab_size is None:
            raise ValueError(f"vocab_size={vocab} in params.json leaves the size to the tokenizer: pass it")
        vocab = vocab_size
    vocab = whole({"vocab_size": vocab}, "vocab_size")
    scaling = None
    if flag(params, "use_scaled_rope"):
        factor = number(params, "rope_scaling_factor", _rope_factor(dim, whole(params, "n_layers")))
        high = number(params, "rope_high_freq_factor", 4.0)
        scaling = RopeScaling("llama3", factor, high_freq_factor=high)
    llama3 = vocab >= LLAMA_3_VOCABULARY  # params.json names no ids; the Llama-3 family is told by its vocabulary
    context = stated(max_context, whole(params, "max_seq_len", _meta_context(params, vocab)))
    window = None if params.get("sliding_window") is None else whole(params, "sliding_window")
    head_dim, ffn_dim = params.get("head_dim"), params.get("hidden_dim")
    if head_dim is None:
        head_dim = even_share(dim, n_heads, "dim", "n_heads")
    if ffn_dim is None:
        multiplier = None if params.get("ffn_dim_multiplier") is None else number(params, "ffn_dim_multiplier")
        ffn_dim = meta_ffn_dim(dim, whole(params, "multiple_of", 256), multiplier)
    return LlamaConfig(
        dim=dim,
        n_layers=whole(params, "n_layers"),
        n_heads=n_heads,
        n_kv_heads=whole(params, "n_kv_heads", n_heads),
        head_dim=whole(params, "head_dim", head_dim),
        ffn_dim=whole(params, "hidden_dim", ffn_dim),
        vocab_size=vocab,
        max_context=context,
        norm_eps=number(params, "norm_eps", 1e-5),
        rope_theta=number(params, "rope_theta", 10000.0),
        rope_scaling=scaling,
        tie_embeddings=tie_embeddings,
        bos_id=128000 if llama3 else 1,
        eos_ids=(128001, 128008, 128009) if llama3 else (2,),
        window=None if window is None or window >= context else window,
    )


def to_meta(config: LlamaConfig) -> dict[str, Any]:
    """The params.json that states this config; ValueError that names the field which Meta's layout cannot say."""
    unsaid = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name)]
    scaling = config.rope_scaling
    if scaling is not None and scaling != RopeScaling(
        "llama3", scaling.factor, high_freq_factor=scaling.high_freq_factor
    ):
        unsaid.append(f"rope_scaling={scaling}")
    if unsaid:
        raise ValueError(f"Meta's params.json has no field for {', '.join(unsaid)}")
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **_meta_width(config.dim, config.ffn_dim),
    }
    if scaling is not None:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": scaling.factor}
        params |= {"rope_high_freq_factor": scaling.high_freq_factor}
    if config.head_dim * config.n_heads != config.dim:
        params["head_dim"] = config.head_dim
    if config.window is not None:
        params["sliding_window"] = config.window
    return params


def _rope_factor(dim: int, n_layers: int) -> float:
    """The factor where a file does not say: 8, as in Meta's code; but Llama 3.2's two small models were trained with 32,
    as their config.json says (github.com/meta-llama/llama-models/issues/166)."""
    return 32.0 if (dim, n_layers) in LLAMA_3_2 else 8.0


def meta_ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's rule for the hidden width of the feed-forward layer: (8192, 4096, 1.3) -> 28672."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def _meta_context(params: Mapping[str, Any], vocab_size: int) -> int:
    """The context of the family that a params.json belongs to."""
    if params.get("use_scaled_rope"):
        return 131072
    if vocab_size >= LLAMA_3_VOCABULARY:
        return 8192
    if "hidden_dim" in params:
        return 32768  # Mistral
    if params.get("rope_theta") == 1e6:
        return 16384  # Code Llama
    return 2048 if params.get("norm_eps") == 1e-6 else 4096  # Llama 1, Llama 2


def _meta_width(dim: int, ffn_dim: int) -> dict[str, Any]:
    """`multiple_of` and, where it needs one, `ffn_dim_multiplier` that give a width: (4096, 11008) -> 256."""
    for multiple_of in (256, 1024, 4096, 32, 1):
        if meta_ffn_dim(dim, multiple_of, None) == ffn_dim:
            return {"multiple_of": multiple_of}
    multiple_of = min(256, ffn_dim & -ffn_dim)
    return {"multiple_of": multiple_of, "ffn_dim_multiplier": (ffn_dim - 0.5 * (multiple_of > 1)) / int(8 * dim / 3)}

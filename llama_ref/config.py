"""LlamaConfig: the numbers that make one Llama, read from the three kinds of file that state them.

Hugging Face writes `config.json`, Meta writes `params.json`, GGUF keeps metadata in the weights' own file. All three
become one frozen value, checked when it is built. A file that asks for something a Llama has not (another activation,
an unknown RoPE scaling, half a head rotated) is refused by the name of its field: a model that loads and is quietly
another model is the worst outcome.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_ref.rope_scaling import RopeScaling, hf_rope_scaling, hf_rope_spelling

__all__ = ["NAMED", "LlamaConfig", "RopeScaling", "as_ids", "llama3_rope_factors", "meta_ffn_dim", "meta_params"]

MAX_LAYERS = 10_000  # far above any Llama; a damaged file must not have us list the tensors of a billion layers


@dataclass(frozen=True)
class LlamaConfig:
    """One Llama's shape. `dim` is the width of the residual stream; attention is n_heads x head_dim wide.

    `head_dim` need not be dim / n_heads. `max_context` counts positions. `eos_ids` are all ids that end a text,
    `bos_id` the one that may start it (whether it does is the tokenizer's business).
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_context: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    attention_bias: bool = False
    """Whether q, k, v and the output projection each add a vector."""
    mlp_bias: bool = False
    """Whether the three matrices of the feed-forward layer each add a vector."""
    window: int | None = None
    """Positions that a token attends to, its own included; None: all before it."""

    def __post_init__(self) -> None:
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_context")
        for name in (*sizes, *(() if self.window is None else ("window",))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        if self.n_layers > MAX_LAYERS:
            raise ValueError(f"n_layers={self.n_layers} is above {MAX_LAYERS}, which no Llama has")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r} must be a positive number")
        yarn = self.rope_scaling is not None and self.rope_scaling.kind == "yarn"
        if yarn and (self.head_dim < 4 or self.rope_theta <= 1):  # its borders are found by a ratio of frequencies
            raise ValueError(f"rope_type='yarn' with head_dim={self.head_dim}, rope_theta={self.rope_theta}")
        for name, ids in (("bos_id", () if self.bos_id is None else (self.bos_id,)), ("eos_ids", self.eos_ids)):
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} holds {token}, outside the vocabulary of {self.vocab_size}")

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> LlamaConfig:
        """From the content of a Hugging Face `config.json`; absent fields take LlamaConfig's published defaults.

        The shape itself has no default: a file without `hidden_size` is refused. Raises ValueError, one line that
        names the field.
        """
        _refuse_unsupported_hf(data)
        dim, n_heads = _required(data, "hidden_size"), _required(data, "num_attention_heads")
        head_dim = data.get("head_dim")
        if head_dim is None:
            head_dim = _even_share(dim, n_heads, "hidden_size", "num_attention_heads")
        rope: Mapping[str, Any] = data.get("rope_parameters") or data.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_scaling={rope!r} must be an object")
        theta = rope.get("rope_theta", data.get("rope_theta"))
        max_context, window = (
            _or(data.get("max_position_embeddings"), _HF_CONTEXT[data["model_type"]]),
            _hf_window(data),
        )
        return cls(
            dim=dim,
            n_layers=_required(data, "num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=_or(data.get("num_key_value_heads"), n_heads),
            head_dim=head_dim,
            ffn_dim=_required(data, "intermediate_size"),
            vocab_size=_required(data, "vocab_size"),
            max_context=max_context,
            norm_eps=float(_or(data.get("rms_norm_eps"), 1e-6)),
            rope_theta=float(_or(theta, 10000.0)),
            rope_scaling=hf_rope_scaling(rope, max_context),
            tie_embeddings=bool(data.get("tie_word_embeddings", False)),
            bos_id=data.get("bos_token_id", 1),
            eos_ids=as_ids(data.get("eos_token_id", 2)),
            attention_bias=bool(data.get("attention_bias")),
            mlp_bias=bool(data.get("mlp_bias")),
            window=None if window is None or window >= max_context else window,
        )

    @classmethod
    def from_meta(
        cls,
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
        dim, n_heads = _required(params, "dim"), _required(params, "n_heads")
        vocab = _or(params.get("vocab_size"), -1)
        if vocab <= 0:
            if vocab_size is None:
                raise ValueError(f"vocab_size={vocab} in params.json leaves the size to the tokenizer: pass it")
            vocab = vocab_size
        scaling = None
        if params.get("use_scaled_rope"):  # factor 8 is what Meta's code has where the file does not say
            scaling = RopeScaling(
                "llama3",
                float(_or(params.get("rope_scaling_factor"), 8.0)),
                high_freq_factor=float(_or(params.get("rope_high_freq_factor"), 4.0)),
            )
        llama3 = vocab >= LLAMA_3_VOCABULARY  # params.json names no ids; the Llama-3 family is told by its vocabulary
        context = _or(max_context, _or(params.get("max_seq_len"), _meta_context(params, vocab)))
        window = params.get("sliding_window")
        head_dim, ffn_dim = params.get("head_dim"), params.get("hidden_dim")
        if ffn_dim is None:
            ffn_dim = meta_ffn_dim(dim, _or(params.get("multiple_of"), 256), params.get("ffn_dim_multiplier"))
        return cls(
            dim=dim,
            n_layers=_required(params, "n_layers"),
            n_heads=n_heads,
            n_kv_heads=_or(params.get("n_kv_heads"), n_heads),
            head_dim=_even_share(dim, n_heads, "dim", "n_heads") if head_dim is None else head_dim,
            ffn_dim=ffn_dim,
            vocab_size=vocab,
            max_context=context,
            norm_eps=float(_or(params.get("norm_eps"), 1e-5)),
            rope_theta=float(_or(params.get("rope_theta"), 10000.0)),
            rope_scaling=scaling,
            tie_embeddings=tie_embeddings,
            bos_id=128000 if llama3 else 1,
            eos_ids=(128001, 128008, 128009) if llama3 else (2,),
            window=None if window is None or window >= context else window,
        )

    @classmethod
    def from_gguf(
        cls,
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
        dim = _required(metadata, "llama.embedding_length")
        n_heads = _gguf_uniform(metadata, "llama.attention.head_count")
        if n_heads is None:
            raise ValueError("llama.attention.head_count is missing")
        stated_head_dim = metadata.get("llama.attention.key_length", metadata.get("llama.rope.dimension_count"))
        head_dim = _or(stated_head_dim, None) or _even_share(
            dim, n_heads, "llama.embedding_length", "llama.attention.head_count"
        )
        for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if metadata.get(name, head_dim) != head_dim:
                raise ValueError(f"{name}={metadata[name]} differs from the head dimension {head_dim}: not supported")
        theta = float(metadata.get("llama.rope.freq_base", 10000.0))
        tokens = metadata.get("tokenizer.ggml.tokens", ())
        ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        return cls(
            dim=dim,
            n_layers=_required(metadata, "llama.block_count"),
            n_heads=n_heads,
            n_kv_heads=_or(_gguf_uniform(metadata, "llama.attention.head_count_kv"), n_heads),
            head_dim=head_dim,
            ffn_dim=_or(_gguf_uniform(metadata, "llama.feed_forward_length"), 0),
            vocab_size=metadata.get("llama.vocab_size", len(tokens)),
            max_context=_required(metadata, "llama.context_length"),
            norm_eps=float(_required(metadata, "llama.attention.layer_norm_rms_epsilon")),
            rope_theta=theta,
            rope_scaling=_gguf_rope_scaling(metadata, theta, head_dim, rope_factors),
            tie_embeddings=tie_embeddings,
            bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_ids=as_ids([token for token in ends if token is not None]),
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of an equivalent Hugging Face `config.json`: `LlamaConfig.from_hf(c.to_hf()) == c`."""
        # a window is a field of Mistral's, whose biases and mask are otherwise Llama's
        family: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if self.window is not None:
            family = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": self.window}
        return {
            **family,
            "hidden_size": self.dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_context,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else hf_rope_spelling(self.rope_scaling),
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
            "hidden_act": "silu",
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }


def as_ids(value: Any) -> tuple[int, ...]:
    """Token ids as files spell them, each once: None -> (), 2 -> (2,), [2, 7, 2] -> (2, 7)."""
    if value is None:
        return ()
    ids = [value] if isinstance(value, int) else list(value)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"eos_token_id={value!r} must be a token id or a list of them")
    return tuple(dict.fromkeys(ids))


def meta_ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's rule for the hidden width of the feed-forward layer: (8192, 4096, 1.3) -> 28672."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


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


def _required(data: Mapping[str, Any], name: str) -> Any:
    """A number that the file must state."""
    value = data.get(name)
    if value is None:
        raise ValueError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} must be a number")
    return value


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _even_share(total: int, parts: int, total_name: str, parts_name: str) -> int:
    if parts <= 0 or total % parts:
        raise ValueError(f"{total_name}={total} does not divide over {parts_name}={parts}, and no head_dim is given")
    return total // parts


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


def meta_params(config: LlamaConfig) -> dict[str, Any]:
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


def _meta_width(dim: int, ffn_dim: int) -> dict[str, Any]:
    """`multiple_of` and, where it needs one, `ffn_dim_multiplier` that give a width: (4096, 11008) -> 256."""
    for multiple_of in (256, 1024, 4096, 32, 1):
        if meta_ffn_dim(dim, multiple_of, None) == ffn_dim:
            return {"multiple_of": multiple_of}
    multiple_of = min(256, ffn_dim & -ffn_dim)
    return {"multiple_of": multiple_of, "ffn_dim_multiplier": (ffn_dim - 0.5 * (multiple_of > 1)) / int(8 * dim / 3)}


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


LLAMA_3_VOCABULARY = 128256
_HF_CONTEXT = {"llama": 2048, "mistral": 131072}  # model_type -> max_position_embeddings where a file does not say
_META_FIELDS = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"),
    *("rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "max_seq_len", "max_batch_size"),
    *("head_dim", "hidden_dim", "sliding_window"),  # Mistral's
}

# As published in each model's own config.json; in order: dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim,
# vocab_size, max_context.
NAMED: dict[str, LlamaConfig] = {
    "llama-2-7b": LlamaConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096, bos_id=1, eos_ids=(2,)),
    "llama-2-13b": LlamaConfig(5120, 40, 40, 40, 128, 13824, 32000, 4096, bos_id=1, eos_ids=(2,)),
    "llama-2-70b": LlamaConfig(8192, 80, 64, 8, 128, 28672, 32000, 4096, bos_id=1, eos_ids=(2,)),
    "llama-3-8b": LlamaConfig(
        4096, 32, 32, 8, 128, 14336, 128256, 8192, rope_theta=500000.0, bos_id=128000, eos_ids=(128001,)
    ),
    "llama-3.2-1b": LlamaConfig(
        *(2048, 16, 32, 8, 64, 8192, 128256, 131072),
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 32.0),
        tie_embeddings=True,
        bos_id=128000,
        eos_ids=(128001,),
    ),
    "smollm2-135m": LlamaConfig(
        576, 30, 9, 3, 64, 1536, 49152, 8192, rope_theta=100000.0, tie_embeddings=True, bos_id=1, eos_ids=(2,)
    ),
    "tinyllama-1.1b": LlamaConfig(2048, 22, 32, 4, 64, 5632, 32000, 2048, bos_id=1, eos_ids=(2,)),
}

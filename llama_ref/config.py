"""LlamaConfig: the numbers that make one Llama, read from the three kinds of file that state them.

Hugging Face writes `config.json`, Meta writes `params.json`, GGUF keeps metadata in the weights' own file. All three
become one frozen value, checked when it is built. A file that asks for something a plain Llama has not (a bias, a
sliding window, another activation, an unknown RoPE scaling) is refused by the name of its field: a model that loads
and is quietly another model is the worst outcome.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_LAYERS = 10_000  # far above any Llama; a damaged file must not have us list the tensors of a billion layers


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pre-training.

    "linear" divides every frequency by `factor`. "llama3" divides those whose wavelength exceeds
    `original_context / low_freq_factor` positions, keeps those below `original_context / high_freq_factor`, and
    blends between the two; "linear" leaves these three numbers at their defaults.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope_type={self.kind!r} is not supported (known: default, linear, llama3)")
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ValueError(f"rope scaling factor={self.factor} must be a number of at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope scaling low_freq_factor={self.low_freq_factor} must lie between 0 and "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.original_context <= 0:
            raise ValueError(f"rope scaling original_context={self.original_context} must be positive")


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

    def __post_init__(self) -> None:
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_context")
        for name in sizes:
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
        theta = rope.get("rope_theta", data.get("rope_theta"))
        return cls(
            dim=dim,
            n_layers=_required(data, "num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=_or(data.get("num_key_value_heads"), n_heads),
            head_dim=head_dim,
            ffn_dim=_required(data, "intermediate_size"),
            vocab_size=_required(data, "vocab_size"),
            max_context=_or(data.get("max_position_embeddings"), 2048),
            norm_eps=float(_or(data.get("rms_norm_eps"), 1e-6)),
            rope_theta=float(_or(theta, 10000.0)),
            rope_scaling=_hf_rope_scaling(rope),
            tie_embeddings=bool(data.get("tie_word_embeddings", False)),
            bos_id=data.get("bos_token_id", 1),
            eos_ids=as_ids(data.get("eos_token_id", 2)),
        )

    @classmethod
    def from_meta(
        cls, params: Mapping[str, Any], *, vocab_size: int | None = None, max_context: int = 2048
    ) -> LlamaConfig:
        """From Meta's `params.json`. It does not state the context, nor (as -1, in Llama 2) the vocabulary's size.

        The width of the feed-forward layer follows Meta's own rule: two thirds of 4 x dim, times
        `ffn_dim_multiplier`, rounded up to `multiple_of`: (4096, multiple_of=256) -> 11008.
        """
        dim, n_heads = _required(params, "dim"), _required(params, "n_heads")
        vocab = params.get("vocab_size", -1)
        if vocab <= 0:
            if vocab_size is None:
                raise ValueError(f"vocab_size={vocab} in params.json leaves the size to the tokenizer: pass it")
            vocab = vocab_size
        scaling = None
        if params.get("use_scaled_rope"):  # factor 8 is what Meta's code has where the file does not say
            scaling = RopeScaling(
                "llama3",
                float(params.get("rope_scaling_factor", 8.0)),
                high_freq_factor=float(params.get("rope_high_freq_factor", 4.0)),
            )
        llama3 = vocab >= 128256  # params.json names no ids; the Llama-3 family is told by its vocabulary
        return cls(
            dim=dim,
            n_layers=_required(params, "n_layers"),
            n_heads=n_heads,
            n_kv_heads=_or(params.get("n_kv_heads"), n_heads),
            head_dim=_even_share(dim, n_heads, "dim", "n_heads"),
            ffn_dim=meta_ffn_dim(dim, _or(params.get("multiple_of"), 256), params.get("ffn_dim_multiplier")),
            vocab_size=vocab,
            max_context=max_context,
            norm_eps=float(_or(params.get("norm_eps"), 1e-5)),
            rope_theta=float(_or(params.get("rope_theta"), 10000.0)),
            rope_scaling=scaling,
            bos_id=128000 if llama3 else 1,
            eos_ids=(128001, 128008, 128009) if llama3 else (2,),
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, tie_embeddings: bool, rope_factors: Sequence[float] | None = None
    ) -> LlamaConfig:
        """From GGUF metadata, plus the two facts that GGUF states by its tensors.

        `tie_embeddings`: the file has no `output.weight`. `rope_factors`: its tensor `rope_freqs.weight`, by which
        llama.cpp divides the frequencies; it must be the llama-3 rule with its published constants.
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
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of an equivalent Hugging Face `config.json`: `LlamaConfig.from_hf(c.to_hf()) == c`."""
        scaling: dict[str, Any] | None = None
        if self.rope_scaling is not None:
            scaling = {"rope_type": self.rope_scaling.kind, "factor": self.rope_scaling.factor}
            if self.rope_scaling.kind == "llama3":
                scaling |= {
                    "low_freq_factor": self.rope_scaling.low_freq_factor,
                    "high_freq_factor": self.rope_scaling.high_freq_factor,
                    "original_max_position_embeddings": self.rope_scaling.original_context,
                }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
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
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
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
    if model_type not in ("llama", "mistral"):
        raise ValueError(f"model_type={model_type!r} is not a Llama (supported: llama, and mistral without a window)")
    # Mistral's own default is a window of 4096: only an explicit null switches it off.
    window = data.get("sliding_window", 4096 if model_type == "mistral" else None)
    wanted: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("hidden_act", data.get("hidden_act", "silu"), ("silu", "swish")),
        ("attention_bias", data.get("attention_bias"), (None, False)),
        ("mlp_bias", data.get("mlp_bias"), (None, False)),
        ("sliding_window", None if data.get("use_sliding_window") is False else window, (None,)),
        ("partial_rotary_factor", data.get("partial_rotary_factor"), (None, 1, 1.0)),
        ("quantization_config", data.get("quantization_config"), (None,)),
    ]
    for name, value, allowed in wanted:
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not supported")
    for kind in data.get("layer_types") or ():
        if kind != "full_attention":
            raise ValueError(f"layer_types holds {kind!r}: only full_attention is supported")


def _hf_rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported")
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(_required(rope, "factor")),
            float(_required(rope, "low_freq_factor")),
            float(_required(rope, "high_freq_factor")),
            int(_required(rope, "original_max_position_embeddings")),
        )
    if kind == "linear":
        return RopeScaling("linear", float(_required(rope, "factor")))
    raise ValueError(f"rope_type={kind!r} is not supported (known: default, linear, llama3)")


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

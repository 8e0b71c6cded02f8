"""LlamaConfig: the numbers that make one Llama, and the shapes that have a name.

Hugging Face writes them to `config.json` (hf_config.py), Meta to `params.json` (meta_config.py), GGUF keeps them in the
weights' own file (gguf_config.py). All three become one frozen value, checked when it is built. A file that asks for
something a Llama has not (another activation, an unknown RoPE scaling, half a head rotated) is refused by the name of
its field: a model that loads and is quietly another model is the worst outcome.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llama_ref.arguments import real, set_of_ids
from llama_ref.rope_scaling import RopeScaling

__all__ = ["NAMED", "LlamaConfig", "RopeScaling"]

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
            value = real(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r} must be a positive number")
        yarn = self.rope_scaling is not None and self.rope_scaling.kind == "yarn"
        if yarn and (self.head_dim < 4 or self.rope_theta <= 1):  # its borders are found by a ratio of frequencies
            raise ValueError(f"rope_type='yarn' with head_dim={self.head_dim}, rope_theta={self.rope_theta}")
        object.__setattr__(self, "eos_ids", set_of_ids("eos_ids", self.eos_ids))
        for name, ids in (("bos_id", () if self.bos_id is None else (self.bos_id,)), ("eos_ids", self.eos_ids)):
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} holds {token}, outside the vocabulary of {self.vocab_size}")


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
    "llama-3.2-3b": LlamaConfig(
        *(3072, 28, 24, 8, 128, 8192, 128256, 131072),
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

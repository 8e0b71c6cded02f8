"""What a checkpoint is, whatever file it came from: a config, and tensors under Meta's canonical names.

Every linear weight is [out, in], and its bias, in the few models that have some, `X.bias` [out]. Rows of `wq` and `wk`
stand in Meta's order: the two halves of rotary pair i are rows 2i and 2i + 1 of their head. A tied model has no
`output.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from llama_ref.config import LlamaConfig

Key = slice | tuple[slice, ...]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES_SHOWN = 20  # a wrong directory misses hundreds of tensors; the first few say what is wrong


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it stands; the message is one line and names the file and the tensors."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # a damaged file may name a tensor with line breaks


class TensorSource(Protocol):
    """A tensor that may still lie in its file: `t[a:b]`, `t[a:b, c:d]` and `t[:]` read that part and nothing else.

    A plain torch.Tensor is one too.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, key: Key, /) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """What an adapter adds to a matrix [out, in]: scale * up @ down, of `up` [out, r] and `down` [r, in].

    With a `magnitude` [out] every row of the sum is then given that length (DoRA).
    """

    up: TensorSource
    down: TensorSource
    scale: float
    magnitude: TensorSource | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A config and its weights by canonical name; `path` is None where no file lies behind them.

    `encoding` says how linear weights are stored: "dense", or a name that `save_checkpoint` was given. Where a file mixes
    several, it is that of most of them, or "stored" of a GGUF file's, and `encodings` names each matrix's by its stem, as
    {"layers.0.attention.wq": "q4_k"}. `low_rank` holds what an adapter adds to encoded matrices when they multiply, by name
    without ".weight"; into dense ones it is merged.
    """

    config: LlamaConfig
    weights: Mapping[str, TensorSource]
    path: Path | None = None
    encoding: str = "dense"
    encodings: Mapping[str, str] = field(default_factory=dict)
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    stored: Checkpoint | None = None
    """The same model with its matrices as the file holds them, where `weights` decodes them as they are read (GGUF)."""
    keeps_stored: bool = False
    """Whether a plan that names no encoding takes `stored`."""

    @property
    def default_encoding(self) -> str:
        """The encoding of a plan that names none."""
        return "stored" if self.stored is not None and self.keeps_stored else self.encoding

    @cached_property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """The parts in which each weight is held, by its stem: {"layers.0.attention.wq": ["weight", "scale"]}; no biases."""
        found: dict[str, list[str]] = {}
        for name in self.weights:
            stem, _, part = name.rpartition(".")
            found.setdefault(stem, []).append(part)
        return {stem: [part for part in parts if part != "bias"] for stem, parts in found.items() if "weight" in parts}

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The whole shape of every tensor that a model of this config has, by its name."""
        return expected_shapes(self.config)


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of this model, in the order in which a forward pass meets them."""
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, config.dim)}
    for layer in range(config.n_layers):
        of_layer = {
            "attention_norm": (config.dim,),
            "attention.wq": (q_rows, config.dim),
            "attention.wk": (kv_rows, config.dim),
            "attention.wv": (kv_rows, config.dim),
            "attention.wo": (config.dim, q_rows),
            "ffn_norm": (config.dim,),
            "feed_forward.w1": (config.ffn_dim, config.dim),
            "feed_forward.w3": (config.ffn_dim, config.dim),
            "feed_forward.w2": (config.dim, config.ffn_dim),
        }
        for name, shape in of_layer.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
            if has_bias(name, config):
                shapes[f"layers.{layer}.{name}.bias"] = shape[:1]
    shapes["norm.weight"] = (config.dim,)
    if not config.tie_embeddings:
        shapes["output.weight"] = (config.vocab_size, config.dim)
    return shapes


def has_bias(part: str, config: LlamaConfig) -> bool:
    """Whether a part of a block, as "attention.wq", adds a vector [out] to its product."""
    attention, mlp = part.startswith("attention."), part.startswith("feed_forward.")
    return (attention and config.attention_bias) or (mlp and config.mlp_bias)


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Raise one CheckpointError that lists all that is missing, extra or misshapen, under the names of `expected`."""
    faults = {
        "missing": [name for name in expected if name not in found],
        "extra": [name for name in found if name not in expected],
        "misshapen": [
            f"{name} is {list(found[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in faults.items() if names)
        raise CheckpointError(f"{where}: {told}")


def check_floats(found: Mapping[str, TensorSource], where: object) -> None:
    """Raise CheckpointError for a tensor that is not stored as plain floats: float8 and integers need a scale each."""
    packed = [name for name, tensor in found.items() if tensor.dtype not in FLOATS]
    if packed:
        kind = str(found[packed[0]].dtype).removeprefix("torch.")
        raise CheckpointError(f"{where}: {packed[0]} is stored as {kind}, not as floats: {len(packed)} such tensors")


def spans(key: Key, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """A key as (start, stop) per dimension, as Python slices count: (slice(-2, None), (5, 4)) -> ((3, 5), (0, 4))."""
    parts = key if isinstance(key, tuple) else (key,)
    if len(parts) > len(shape):
        raise IndexError(f"{len(parts)} slices for a tensor of shape {list(shape)}")
    result = []
    for size, part in zip(shape, parts + (slice(None),) * (len(shape) - len(parts))):
        if not isinstance(part, slice):
            raise TypeError(f"a stored tensor is read by slices, not by {part!r}")
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"a stored tensor is read by slices of step 1, not {step}")
        result.append((start, max(start, stop)))
    return tuple(result)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more

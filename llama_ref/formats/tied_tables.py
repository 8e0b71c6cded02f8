"""The two tables of a model, of the tokens' embeddings and of the output: a tied model has one for both.

Its file may store the one under either name, or under both. If both are there and differ, the config is wrong about the
file: both are used, as transformers 5.24 does, and a warning says so.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch

from llama_ref.config import LlamaConfig
from llama_ref.weights import TensorSource

T = TypeVar("T", bound=TensorSource)
ROWS_COMPARED = 8192  # so that comparing two tables never holds more than a part of them


def settle_tables(
    stored: Mapping[str, T], config: LlamaConfig, tables: tuple[str, str], where: object
) -> tuple[dict[str, T], LlamaConfig]:
    """The tensors with one table if the model is tied, under the first of the names `tables`; and the config they fit.

    settle_tables({"lm_head.weight": t}, tied, ("model.embed_tokens", "lm_head"), "m") -> {"model.embed_tokens.weight": t}
    """
    stems = [name.rpartition(".") for name in stored]
    further = sorted({part for stem, _, part in stems if stem in tables} - {"weight"})  # of a table that is encoded
    embeddings, output = ([f"{stem}.{part}" for part in ("weight", *further)] for stem in tables)
    if not config.tie_embeddings or output[0] not in stored:
        return dict(stored), config
    if embeddings[0] in stored:
        pairs = [(stored.get(one), stored.get(other)) for one, other in zip(embeddings, output)]
        if not all(same_tensor(one, other) for one, other in pairs):
            told = f"tie_word_embeddings is true, but {output[0]} is stored and differs from {embeddings[0]}"
            warnings.warn(f"{where}: {told}: both are read", stacklevel=3)
            return dict(stored), dataclasses.replace(config, tie_embeddings=False)
        return {name: tensor for name, tensor in stored.items() if name not in output}, config
    renamed = dict(zip(output, embeddings))
    return {renamed.get(name, name): tensor for name, tensor in stored.items()}, config


def same_tensor(one: TensorSource | None, other: TensorSource | None) -> bool:
    """Whether two stored matrices hold equal numbers, read a part at a time; two that are absent are the same."""
    if one is None or other is None:
        return one is other
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.data_ptr() == other.data_ptr():
        return one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
    if tuple(one.shape) != tuple(other.shape) or len(one.shape) != 2:
        return False
    for row in range(0, one.shape[0], ROWS_COMPARED):
        rows, others = one[row : row + ROWS_COMPARED], other[row : row + ROWS_COMPARED]
        if not torch.equal(rows, others if rows.dtype == others.dtype else others.to(rows.dtype)):
            return False
    return True

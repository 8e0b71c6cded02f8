"""A checkpoint's weights as a plan stores them: encoded, and cut to the part that this process holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llama_fast.parallel.alone import Whole
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint, TensorSource
from llama_ref.config import LlamaConfig

STRIPE_BYTES = 8 << 20
"""Rows of a file that are held at once to be encoded: the host's memory is for this process's part, and little more."""


def encoded(
    checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype | None, device: torch.device
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every weight as (name without ".weight", parts), one at a time: this process's part of it, encoded on `device`.

    What the encoding leaves alone becomes `dtype`; None keeps it as stored.
    """
    for name in checkpoint.weights:
        stem, _, part = name.rpartition(".")
        if part != "weight":  # read together with its weight
            continue
        parts = encode_one(checkpoint, stem, plan, dtype, device)
        bias = bias_of(checkpoint, stem, plan)
        yield stem, parts if bias is None else parts | {"bias": bias.to(device, dtype or bias.dtype)}


def encode_one(
    checkpoint: Checkpoint, stem: str, plan: Plan, dtype: torch.dtype | None, device: torch.device
) -> dict[str, Tensor]:
    """The parts of one weight. Of rows only this process's are read; where columns are cut, whole rows, a stripe at a time."""
    weights, config, encoding = checkpoint.weights, checkpoint.config, plan.encoding
    source = weights[f"{stem}.weight"]
    scale = weights.get(f"{stem}.scale")
    part = plan.shard.part(stem, source.shape, config)
    if scale is not None:
        return {name: read.to(device) for name, read in cut({"weight": source, "scale": scale}, part).items()}
    kept = dtype or source.dtype
    if not is_encoded(stem, config):
        return {"weight": read(source, part).to(device).to(kept)}
    if encoding.name == "dense":
        return encoding.encode(read(source, part).to(device), kept)
    # A scale is that of the whole row, whichever columns of it are kept here: so all processes hold one matrix's numbers.
    first, stop, _ = part[0].indices(source.shape[0])
    on_file = not hasattr(source, "device")  # what has a device is in its memory, or drawn there whole
    rows = max(1, STRIPE_BYTES // (source.shape[1] * source.dtype.itemsize)) if on_file else max(1, stop)
    parts: dict[str, Tensor] = {}
    for row in range(first, stop, rows):
        stripe = encoding.encode(source[row : min(row + rows, stop)].to(device), kept)
        for name, tensor in cut(stripe, (slice(None), part[1])).items():
            if row == first:  # laid out whole before anything else is, so that what a stripe needs is given back
                parts[name] = tensor.new_empty(stop - first, *tensor.shape[1:])
            parts[name][row - first : row - first + len(tensor)] = tensor
    return parts


def bias_of(checkpoint: Checkpoint, stem: str, plan: Plan) -> Tensor | None:
    """This process's part of a bias [out]: cut with its weight's rows. Where columns are cut, products are summed over the
    processes, and the bias must come in once: from the one that holds the first column."""
    source = checkpoint.weights.get(f"{stem}.bias")
    if source is None:
        return None
    shape = checkpoint.weights[f"{stem}.weight"].shape
    rows, columns = plan.shard.part(stem, shape, checkpoint.config)
    bias = read(source, (rows,))
    return bias if columns.indices(shape[1])[0] == 0 else torch.zeros_like(bias)


def read(source: TensorSource, part: tuple[slice, ...]) -> Tensor:
    """A part of a stored tensor; contiguous, and not a window that keeps the whole alive."""
    return source[part].contiguous()


def cut(parts: Mapping[str, TensorSource], part: tuple[slice, ...]) -> dict[str, Tensor]:
    """A part of an encoded matrix: every tensor along the weight's axes, unless it has length 1 there.

    A scale [out, groups] is cut where the weight is; ValueError where that would part a group.
    """
    shape = parts["weight"].shape
    return {
        name: read(held, tuple(rescaled(*axis) for axis in zip(part, shape, held.shape)))
        for name, held in parts.items()
    }


def rescaled(part: slice, size: int, length: int) -> slice:
    """A slice of an axis of `size` as one of `length` entries: (64:128 of 256, 4) -> 1:2; (64:128 of 256, 1) -> all."""
    if length == 1:
        return slice(None)
    start, stop, _ = part.indices(size)
    if start * length % size or stop * length % size:
        raise ValueError(f"columns {start} to {stop} of {size} part one of {length} groups")
    return slice(start * length // size, stop * length // size)


def is_encoded(stem: str, config: LlamaConfig) -> bool:
    """Whether the plan's encoding holds this weight: every matrix that is read whole for every token.

    The norms are vectors, and of an untied embedding table a token reads one row: these stay as they are.
    """
    return not stem.endswith("norm") and (stem != "tok_embeddings" or config.tie_embeddings)


class DecodedWeights(Mapping[str, Tensor]):
    """Canonical dense weights with exactly the numbers that a plan computes with, made anew at every access."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, device: torch.device):
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._plan = replace(plan, shard=Whole())
        self._names = [name for name in checkpoint.weights if not name.endswith(".scale")]

    def __getitem__(self, name: str) -> Tensor:
        stem = name.removesuffix(".weight")
        if name.endswith(".bias"):
            return self._checkpoint.weights[name][:].to(self._device, self._dtype)
        parts = encode_one(self._checkpoint, stem, self._plan, self._dtype, self._device)
        return self._plan.encoding.decode(parts) if is_encoded(stem, self._checkpoint.config) else parts["weight"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

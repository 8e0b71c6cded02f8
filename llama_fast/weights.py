"""A checkpoint's weights as a plan stores them: encoded, and cut to the part that this process holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llama_fast.contracts import Encoding, PartLayout
from llama_fast.encodings.by_name import of_size, readable
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.ggml import read_by_kernels, repacked
from llama_fast.model.matrices import Stored
from llama_fast.parallel.alone import Whole
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint, TensorSource
from llama_ref.config import LlamaConfig
from llama_ref.weights import FLOATS, CheckpointError, check_shapes

STRIPE_BYTES = 8 << 20
"""Rows of a file that are held at once to be encoded: the host's memory is for this process's part, and little more."""


def encoded(
    checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype | None, device: torch.device
) -> Iterator[tuple[str, Stored]]:
    """Every weight of which this process holds a part, as (name without ".weight", stored), one at a time, encoded on `device`.

    What the encoding leaves alone becomes `dtype`; None keeps it as stored.
    """
    checkpoint = as_planned(checkpoint, plan)
    for stem in checkpoint.parts:
        if not is_held(checkpoint, stem, plan):
            continue
        stored, bias = encode_one(checkpoint, stem, plan, dtype, device), bias_of(checkpoint, stem, plan)
        low_rank = low_rank_of(checkpoint, stem, plan, dtype, device)
        bias = None if bias is None else bias.to(device, dtype or bias.dtype)
        yield stem, replace(stored, bias=bias, low_rank=low_rank)


class Arriving:
    """Weights by stem, each encoded when it is asked for, so that what is joined is not held beside all that is not yet."""

    def __init__(self, weights: Iterator[tuple[str, Stored]]):
        self._weights, self._passed = weights, dict[str, Stored]()

    def pop(self, stem: str) -> Stored:
        """One weight, once."""
        while stem not in self._passed:
            self._passed.update([next(self._weights)])
        return self._passed.pop(stem)


def named_tensors(
    checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype | None, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The same as ("layers.0.attention.wq.scale", tensor), as a file names them; ValueError for what no file holds."""
    if checkpoint.low_rank:
        raise ValueError(
            "an adapter beside encoded weights cannot be saved with them: adapt the dense model, then encode it"
        )
    for stem, stored in encoded(checkpoint, plan, dtype, device):
        for part, tensor in stored.tensors.items():
            yield f"{stem}.{part}", tensor


def encode_one(
    checkpoint: Checkpoint, stem: str, plan: Plan, dtype: torch.dtype | None, device: torch.device
) -> Stored:
    """One weight. Reads only this process's rows; where columns are cut, whole rows, one stripe at a time."""
    checkpoint = as_planned(checkpoint, plan)
    source, whole_shape = checkpoint.weights[f"{stem}.weight"], checkpoint.shapes[f"{stem}.weight"]
    cut = plan.shard.part(stem, whole_shape, checkpoint.config)
    shape = tuple(len(range(*part.indices(size))) for part, size in zip(cut, whole_shape, strict=True))
    encoding, is_kept = held_as(checkpoint, stem, plan, dtype)
    if is_kept:
        stored = parts_of(checkpoint, stem)
        check_layout(stem, stored, encoding.layout(whole_shape), checkpoint.path)
        try:
            parts = encoding.cut(stored, whole_shape, cut)
        except CheckpointError:
            raise
        except ValueError as error:  # a group that would be parted
            raise ValueError(f"{stem}, stored as {encoding.name}: {error}") from error
        if plan.arithmetic.name or device.type != "cpu":
            encoding, parts = repacked(encoding, parts)
        return Stored(encoding, shape, {name: held.to(device) for name, held in parts.items()})
    kind = dtype or source.dtype
    if encoding == Dense():
        return Stored(encoding, shape, encoding.encode(source[cut].contiguous().to(device), kind))
    # A scale is that of the whole row, whichever columns of it are kept here: so all processes hold one matrix's numbers.
    first, stop, _ = cut[0].indices(source.shape[0])
    on_file = not hasattr(source, "device")  # what has a device is in its memory, or drawn there whole
    rows = max(1, STRIPE_BYTES // (source.shape[1] * source.dtype.itemsize)) if on_file else max(1, stop)
    parts = {}
    for row in range(first, stop, rows):
        count = min(rows, stop - row)
        stripe = encoding.encode(source[row : row + count].to(device), kind)
        for name, tensor in encoding.cut(stripe, (count, source.shape[1]), (slice(None), cut[1])).items():
            if row == first:  # laid out whole before anything else is, so that what a stripe needs is given back
                parts[name] = tensor.new_empty(stop - first, *tensor.shape[1:])
            parts[name][row - first : row - first + len(tensor)] = tensor
    return Stored(encoding, shape, parts)


def is_held(checkpoint: Checkpoint, stem: str, plan: Plan) -> bool:
    """Whether this process holds anything of a weight."""
    shape = checkpoint.shapes[f"{stem}.weight"]
    return len(range(*plan.shard.part(stem, shape, checkpoint.config)[0].indices(shape[0]))) > 0


def as_planned(checkpoint: Checkpoint, plan: Plan) -> Checkpoint:
    """The checkpoint with its matrices as the file holds them, if the plan keeps them so and the file has others than floats."""
    stored = checkpoint.stored if plan.encoding.name == "stored" else None
    return checkpoint if stored is None else stored


def encoding_of(checkpoint: Checkpoint, stem: str, encoding: Encoding) -> Encoding:
    """How one matrix is, or shall be, stored: as the checkpoint says of it, else as `encoding`. CheckpointError, by name."""
    name = checkpoint.encodings.get(stem, encoding.name)
    found = encoding if name == encoding.name else readable().get(name) or of_size(name)
    if found is None:
        raise CheckpointError(
            f"{checkpoint.path}: {stem} is stored as {name}, which is not multiplied as it is: take the encoding dense"
        )
    return found


def held_as(checkpoint: Checkpoint, stem: str, plan: Plan, dtype: torch.dtype | None) -> tuple[Encoding, bool]:
    """The encoding of one weight under a plan, and whether the weight is kept as the file holds it; else it is encoded."""
    parts, encoding = parts_of(checkpoint, stem), encoding_of(checkpoint, stem, plan.encoding)
    kind, of_file = parts["weight"].dtype, checkpoint.encoding == "stored" and stem in checkpoint.encodings
    if is_stored_encoded(parts) or (of_file and kind is not (dtype or kind)):
        return encoding, True
    if checkpoint.encoding == "dense" and is_encoded(stem, checkpoint.config) and encoding.name != "stored":
        return encoding, False
    return Dense(), False


def parts_of(checkpoint: Checkpoint, stem: str) -> dict[str, TensorSource]:
    """What a checkpoint holds of one weight: {"weight": ...}, and of an encoded one {"weight": ..., "scale": ...}."""
    return {part: checkpoint.weights[f"{stem}.{part}"] for part in checkpoint.parts[stem]}


def is_stored_encoded(parts: Mapping[str, TensorSource]) -> bool:
    """Whether the parts are those of an encoding: several, or one that is no plain floats."""
    return len(parts) > 1 or parts["weight"].dtype not in FLOATS


def check_layout(stem: str, parts: Mapping[str, TensorSource], layout: Mapping[str, PartLayout], where: object) -> None:
    """CheckpointError unless the parts are those of the layout, in shape and type."""
    found = {f"{stem}.{name}": tuple(source.shape) for name, source in parts.items()}
    check_shapes(found, {f"{stem}.{name}": shape for name, (shape, _) in layout.items()}, where)
    for name, (_, dtype) in layout.items():
        held = parts[name].dtype
        if held is not dtype if dtype is not None else not held.is_floating_point:
            wanted = "floats" if dtype is None else str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{where}: {stem}.{name} is {str(held).removeprefix('torch.')}, not {wanted}")


def check_weights(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype) -> None:
    """CheckpointError unless every weight that is kept in parts is whole; ValueError for one that the kernels cannot read."""
    checkpoint = as_planned(checkpoint, plan)
    for stem in checkpoint.parts:
        encoding, is_kept = held_as(checkpoint, stem, plan, dtype)
        if is_kept:
            layout = encoding.layout(checkpoint.shapes[f"{stem}.weight"])
            check_layout(stem, parts_of(checkpoint, stem), layout, checkpoint.path)
        if plan.arithmetic.name and not read_by_kernels(encoding).loader:
            told = f"the fused kernels read no {encoding.name} weights ({stem})"
            raise ValueError(f"{told}: take Compiled(), or the encoding dense")


def share_of(table: Stored, name: str, plan: Plan, config: LlamaConfig) -> Stored:
    """This process's part of a matrix that is held whole, as if it were called `name`."""
    cut = plan.shard.part(name, table.shape, config)
    rows = len(range(*cut[0].indices(table.shape[0])))
    return Stored(table.encoding, (rows, *table.shape[1:]), table.encoding.cut(table.parts, table.shape, cut))


def bias_of(checkpoint: Checkpoint, stem: str, plan: Plan) -> Tensor | None:
    """This process's part of a bias [out]: cut with its weight's rows. Where columns are cut, products are summed over the
    processes, and the bias must come in once: from the one that holds the first column."""
    source = checkpoint.weights.get(f"{stem}.bias")
    if source is None:
        return None
    shape = checkpoint.shapes[f"{stem}.weight"]
    rows, columns = plan.shard.part(stem, shape, checkpoint.config)
    bias = source[(rows,)].contiguous()
    return bias if columns.indices(shape[1])[0] == 0 else torch.zeros_like(bias)


def low_rank_of(
    checkpoint: Checkpoint, stem: str, plan: Plan, dtype: torch.dtype | None, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """This process's part of what an adapter adds to an encoded matrix: up [out, r], the scale in it, and down [r, in].

    In float32 for a model in bf16 too, as peft keeps them: bf16 would round the sum three times more.
    `up` is cut with the matrix's rows and `down` with its columns: summed over the processes, it is still the product.
    """
    pair = checkpoint.low_rank.get(stem)
    if pair is None:
        return None
    rows, columns = plan.shard.part(stem, checkpoint.shapes[f"{stem}.weight"], checkpoint.config)
    up, down = pair.scale * pair.up[rows, :].double(), pair.down[:, columns]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return up.to(device, wide).contiguous(), down.to(device, wide).contiguous()


def is_encoded(stem: str, config: LlamaConfig) -> bool:
    """Whether the plan's encoding holds this weight: every matrix that is read whole for every token.

    The norms are vectors, and of an untied embedding table a token reads one row: these stay as they are.
    """
    return not stem.endswith("norm") and (stem != "tok_embeddings" or config.tie_embeddings)


class DecodedWeights(Mapping[str, Tensor]):
    """Canonical dense weights with exactly the numbers that a plan computes with, made anew at every access."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, device: torch.device):
        self._checkpoint, self._dtype, self._device = as_planned(checkpoint, plan), dtype, device
        self._plan = replace(plan, shard=Whole())
        self._names = [name for name in checkpoint.weights if name.endswith((".weight", ".bias"))]

    def __getitem__(self, name: str) -> Tensor:
        stem = name.removesuffix(".weight")
        if name.endswith(".bias"):
            return self._checkpoint.weights[name][:].to(self._device, self._dtype)
        stored = encode_one(self._checkpoint, stem, self._plan, self._dtype, self._device)
        decoded = stored.encoding.decode(stored.parts)
        low_rank = low_rank_of(self._checkpoint, stem, self._plan, self._dtype, self._device)
        if low_rank is None:
            return decoded
        up, down = (part.double() for part in low_rank)
        return decoded.double() + up @ down

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

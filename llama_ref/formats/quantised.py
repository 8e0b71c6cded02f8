"""What a reader of quantised matrices is given, and what all such readers ask of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_ref.formats.narrow import Rows
from llama_ref.weights import FLOATS, CheckpointError, TensorSource


@dataclass(frozen=True, eq=False)
class Quantised:
    """A directory's `quantization_config` and tensors; what a reader has taken is no longer in `stored`."""

    directory: Path
    settings: Mapping[str, Any]
    stored: dict[str, TensorSource]
    shapes: Mapping[str, tuple[int, int]]
    """[out, in] of every matrix of the model, by module: "model.layers.0.self_attn.q_proj"."""
    metadata: Mapping[str, str]
    """What the headers of the safetensors files state besides tensors."""

    def modules_with(self, part: str) -> list[str]:
        """The modules that have a tensor of this name."""
        return [module for module in self.shapes if f"{module}.{part}" in self.stored]

    def take(self, module: str, part: str, shape: tuple[int, ...], kinds: Iterable[torch.dtype]) -> TensorSource:
        """One tensor of a module; CheckpointError unless it is there, in this shape and one of these types."""
        name, kinds = f"{module}.{part}", tuple(kinds)
        if name not in self.stored:
            raise CheckpointError(f"{self.directory}: 1 missing: {name}")
        source = self.stored.pop(name)
        if tuple(source.shape) != shape:
            raise CheckpointError(f"{self.directory}: {name} is {list(source.shape)}, not {list(shape)}")
        if source.dtype not in kinds:
            told = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
            raise CheckpointError(
                f"{self.directory}: {name} is stored as {str(source.dtype).removeprefix('torch.')}, not as {told}"
            )
        return source

    def shape_of(self, module: str, part: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there, with so many axes."""
        name = f"{module}.{part}"
        if name not in self.stored:
            raise CheckpointError(f"{self.directory}: 1 missing: {name}")
        shape = tuple(self.stored[name].shape)
        if len(shape) != axes:
            raise CheckpointError(f"{self.directory}: {name} has shape {list(shape)}, not {axes} axes")
        return shape

    def scales(self, module: str, part: str, shapes: Iterable[tuple[int, ...]]) -> TensorSource:
        """Scales in one of several shapes."""
        name, shapes = f"{module}.{part}", list(shapes)
        if name in self.stored and tuple(self.stored[name].shape) in shapes:
            shapes = [tuple(self.stored[name].shape)]
        return self.take(module, part, shapes[0], FLOATS)

    def drop(self, module: str, *parts: str) -> list[str]:
        """Take what is not used; the names of what was there."""
        names = [f"{module}.{part}" for part in parts if f"{module}.{part}" in self.stored]
        for name in names:
            del self.stored[name]
        return names

    def weights_only(self, what: str) -> None:
        """Say that activations stay floating where the tool would round them too."""
        told = f"{what}: here weights alone are of few bits, and activations stay floating"
        warnings.warn(f"{self.directory}: {told}", stacklevel=5)


def transposed(source: TensorSource, columns: int) -> Rows:
    """Rows [rows, columns] of the transpose of a table [columns, out]."""
    return lambda start, stop: source[slice(0, columns), slice(start, stop)].t().contiguous()


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern "re:..." of compressed-tensors, or a whole name, means this module; ValueError for a broken one."""
    if not pattern.startswith("re:"):
        return pattern == name
    try:
        return re.match(pattern.removeprefix("re:"), name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r:.80} is no pattern ({error})") from error


def refused(name: str, value: object) -> ValueError:
    """The error for a setting that is not supported."""
    return ValueError(f"{name}={value!r:.80} is not supported")

"""Directories in Hugging Face's layout whose matrices another tool has quantised: told by `quantization_config`.

Each kind has a file that reads it. A matrix X of ours takes the place of the tool's tensors as `X.weight`, `X.scale` and so
on, under the module's own name; what a reader does not take stays in the mapping, and is refused as extra.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_ref.formats import awq, compressed_tensors, fp8_files, gptq, torchao_files
from llama_ref.formats.narrow import Narrow, hold
from llama_ref.formats.quantised import Quantised
from llama_ref.weights import FLOATS, CheckpointError, TensorSource

STATED = ("quantization_config", "compression_config")  # the second is compressed-tensors' older name
READERS: dict[str, Callable[[Quantised], dict[str, Narrow]]] = {
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "fbgemm_fp8": fp8_files.read_fbgemm,
    "fp8": fp8_files.read_fp8,
    "gptq": gptq.read,
    "torchao": torchao_files.read,
}


def stated_in(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json states of a kind that is read here; None where it states none, or another."""
    for name in STATED:
        stated = data.get(name)
        if isinstance(stated, dict):
            method = stated.get("quant_method", "compressed-tensors" if "config_groups" in stated else None)
            return stated | {"quant_method": method} if isinstance(method, str) and method in READERS else None
    return None


def without(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what it states of encoded weights."""
    return {name: value for name, value in data.items() if name not in STATED}


def held(
    stored: Mapping[str, TensorSource],
    settings: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    directory: Path,
) -> tuple[dict[str, TensorSource], dict[str, str]]:
    """The tensors with encoded matrices as parts of our encodings, and the encoding of each: module -> name.

    `expected` are the shapes of the model's tensors by stored name. Biases of zero that it has not, which some tools store,
    are left out. Raises CheckpointError.
    """
    shapes = {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in expected.items() if len(shape) == 2}
    stored = {name: source for name, source in stored.items() if name in expected or not is_zero_bias(name, source)}
    quantised = Quantised(directory, settings, stored, shapes, metadata)
    try:
        found = READERS[settings["quant_method"]](quantised)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{directory / 'config.json'}: quantization_config: {error}") from error
    names = {}
    for module, matrix in found.items():
        names[module], parts = hold(matrix, f"{directory}: {module}")
        if any(f"{module}.{part}" in quantised.stored for part in parts):
            raise CheckpointError(f"{directory}: {module} is stored twice: in parts, and as a plain weight")
        quantised.stored.update({f"{module}.{part}": source for part, source in parts.items()})
    if not names:
        raise CheckpointError(f"{directory}: config.json says {settings['quant_method']}, and no matrix is stored so")
    return quantised.stored, names


def is_zero_bias(name: str, source: TensorSource) -> bool:
    """Whether a tensor is a bias that adds nothing."""
    found = name.endswith(".bias") and len(source.shape) == 1 and source.dtype in FLOATS
    return found and not bool(source[:].any())

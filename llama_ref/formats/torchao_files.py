"""torchao in safetensors: a quantised `X.weight` lies flattened as `X._weight_qdata`, `X._weight_scale` and so on.

The files' headers state, under each tensor's name, of which class it was: Int8Tensor and Float8Tensor (weight-only), and
IntxUnpackedToInt8Tensor, whose integers of a few bits lie in bytes. Zero points that are all zero are not held.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from llama_ref.formats.fp8_files import block_of
from llama_ref.formats.narrow import E4M3, Narrow, matrix_rows, table_rows
from llama_ref.formats.quantised import Quantised, refused
from llama_ref.weights import CheckpointError

NUMBERS = "_weight_qdata"
KINDS = {"Int8Tensor": torch.int8, "IntxUnpackedToInt8Tensor": torch.int8, "Float8Tensor": E4M3}
OF_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")


def read(quantised: Quantised) -> dict[str, Narrow]:
    """The matrices that lie flattened; CheckpointError, or ValueError for a class that is not supported."""
    rounds: set[str] = set()
    found = {module: _matrix(quantised, module, rounds) for module in quantised.modules_with(NUMBERS)}
    if rounds:
        quantised.weights_only(", ".join(sorted(rounds)))
    return found


def _matrix(quantised: Quantised, module: str, rounds: set[str]) -> Narrow:
    out, columns = shape = quantised.shapes[module]
    data, kind = _stated(quantised, f"{module}.weight")
    rounds |= {name for name in OF_ACTIVATIONS if data.get(name) is not None}
    block = block_of(data.get("block_size"), "block_size")
    if block is None:
        raise ValueError(f"{module}.weight states no block_size")
    rows, size = min(block[0], out), min(block[1], columns)
    if out % rows or columns % size:
        raise ValueError(f"block_size={list(block)} does not divide {module}.weight of {list(shape)}")
    tables = [(out // rows, columns // size), *([()] if (rows, size) == shape else [])]
    numbers = quantised.take(module, NUMBERS, shape, (KINDS[kind],))
    scale = quantised.scales(module, "_weight_scale", tables)
    bits, zero = _bits(data) if kind == "IntxUnpackedToInt8Tensor" else 8, None
    if f"{module}._weight_zero_point" in quantised.stored:
        points = quantised.take(module, "_weight_zero_point", tuple(scale.shape), (torch.int8,))
        read_zero = table_rows(points, out, rows)
        zero = read_zero if bool(read_zero(0, out).any()) else None
    read_scale = table_rows(scale, out, rows)
    return Narrow(
        shape, bits, matrix_rows(numbers), read_scale, scale.dtype, size, zero, floating=kind == "Float8Tensor"
    )


def _stated(quantised: Quantised, name: str) -> tuple[Mapping[str, Any], str]:
    """What the header states of a tensor: (its attributes, the name of its class)."""
    stated = quantised.metadata.get(name)
    if stated is None:
        raise CheckpointError(f"{quantised.directory}: the header of its file does not say of which class {name} was")
    try:
        data = json.loads(stated)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{quantised.directory}: what the header states of {name} is no JSON") from error
    kind, attributes = (data.get("_type"), data.get("_data")) if isinstance(data, dict) else (None, None)
    if not isinstance(kind, str) or kind not in KINDS or not isinstance(attributes, dict):
        raise refused(f"{name} of class", kind)
    return attributes, kind


def _bits(data: Mapping[str, Any]) -> int:
    """Of "int4" in {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}}: 4."""
    target = data.get("target_dtype")
    named = target.get("_data") if isinstance(target, dict) else None
    if not isinstance(named, str) or not re.fullmatch("int[1-8]", named):
        raise refused("target_dtype", target)
    return int(named[-1])

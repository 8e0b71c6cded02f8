"""Fp8 (e4m3) with scales: the "fp8" of transformers and AutoFP8, and FBGEMM's.

| kind | scale | shape |
|---|---|---|
| `fp8` with `weight_block_size` [R, C] | `weight_scale_inv` | [out / R, in / C], rounded up: the last blocks may be short |
| `fp8` without | `weight_scale_inv` or `weight_scale` | one number, or one a row |
| `fbgemm_fp8` | `weight_scale` | [out, 1] |

Under either name the scale is what the stored number is multiplied by. Blocks are those that the config states: transformers
5.24 takes them, on a CPU, for rows / rows of scales.
"""

from __future__ import annotations

from typing import Any

from llama_ref.formats.fields import word
from llama_ref.formats.narrow import E4M3, Narrow, matrix_rows, table_rows, vector_rows
from llama_ref.formats.quantised import Quantised, refused
from llama_ref.weights import FLOATS

OF_ACTIVATIONS = ("activation_scale", "input_scale", "input_scale_ub", "output_scale")
OF_CACHE = ("k_scale", "v_scale")


def read_fp8(quantised: Quantised) -> dict[str, Narrow]:
    """The matrices that are stored as e4m3; CheckpointError, or ValueError for a setting that is not supported."""
    settings = quantised.settings
    scheme = word(settings, "activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise refused("activation_scheme", scheme)
    if word(settings, "fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise refused("fmt", settings["fmt"])
    block = block_of(settings.get("weight_block_size"), "weight_block_size")
    found = {module: _matrix(quantised, module, block) for module in _stored_in_fp8(quantised)}
    quantised.weights_only(f"activation_scheme={scheme!r}")
    return found


def read_fbgemm(quantised: Quantised) -> dict[str, Narrow]:
    """The same of FBGEMM, which has a scale for each row."""
    found = {module: _matrix(quantised, module, None) for module in _stored_in_fp8(quantised)}
    quantised.weights_only("fbgemm_fp8 rounds activations")
    return found


def _stored_in_fp8(quantised: Quantised) -> list[str]:
    return [name for name in quantised.modules_with("weight") if quantised.stored[f"{name}.weight"].dtype is E4M3]


def _matrix(quantised: Quantised, module: str, block: tuple[int, int] | None) -> Narrow:
    out, columns = shape = quantised.shapes[module]
    weight = quantised.take(module, "weight", shape, (E4M3,))
    quantised.drop(module, *OF_ACTIVATIONS, *OF_CACHE)
    quantised.drop(module.rpartition(".")[0], *OF_CACHE)
    inverse = f"{module}.weight_scale_inv" in quantised.stored
    part = "weight_scale_inv" if inverse else "weight_scale"
    if block is None:
        scale = quantised.scales(module, part, [(out, 1), (out,), (), (1,), (1, 1)])
        if tuple(scale.shape) == (out,) != (1,):
            return Narrow(shape, 8, matrix_rows(weight), vector_rows(scale), scale.dtype, columns, floating=True)
        return Narrow(shape, 8, matrix_rows(weight), table_rows(scale, out), scale.dtype, columns, floating=True)
    blocks = -(-out // block[0]), -(-columns // block[1])
    scale = quantised.take(module, part, blocks, FLOATS)
    return Narrow(shape, 8, matrix_rows(weight), table_rows(scale, out, block[0]), scale.dtype, block[1], floating=True)


def block_of(stated: Any, name: str) -> tuple[int, int] | None:
    """Rows and columns of a block; None where none is stated."""
    if stated is None:
        return None
    whole = isinstance(stated, (list, tuple)) and len(stated) == 2
    if not whole or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in stated):
        raise ValueError(f"{name}={stated!r:.80} must be two positive whole numbers")
    return stated[0], stated[1]

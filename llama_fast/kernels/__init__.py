"""Triton kernels of one decode step: the plain path's linear, norm, rotary and attention calls in five launches a layer, and a
launch more for each sum over ranks.

`available()` says whether they can be imported here (Triton present); the modules themselves import Triton.
Legend for shapes: B batch, T tokens per row of the batch, M = B * T rows, D model dim, H query heads, G = H / Hkv,
S cache slots, K columns of a weight (its input), N rows of a weight (its output).
"""

import importlib.util
import os


def available() -> bool:
    """Whether Triton can be imported: the kernels' modules need it, the rest of the library does not."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device and slowly: TRITON_INTERPRET=1, set before import."""
    return os.environ.get("TRITON_INTERPRET") == "1"

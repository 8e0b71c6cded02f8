"""What a process that runs for weeks piles up: the products that oneDNN has prepared for each number of rows it has seen."""

from __future__ import annotations

import os

KEPT = 64
"""Prepared products; a model has four or five matrices of different shapes, so these are those of a dozen lengths of prompts."""
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""The environment's names for the size of oneDNN's cache, and of the one that PyTorch has in front of it: 1,024 by default."""


def bound_prepared_products() -> None:
    """Have a CPU keep few prepared products, unless the environment says how many. To be called before the first product.

    Each holds some 0.3 MB in either cache, and every new length of a prompt makes one for each shape of matrix: 0.5 GB after
    some hundred lengths. To prepare one takes a millisecond.
    """
    for name in CACHES:
        os.environ.setdefault(name, str(KEPT))

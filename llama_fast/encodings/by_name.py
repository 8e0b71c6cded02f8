"""The encodings by name, from the lists in the files of this folder.

`ENCODINGS = (Int8(),)` are those that a plan may ask for; `STORED = (Ggml("q4_k"),)` are read from files and made nowhere.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

import llama_fast.encodings
from llama_fast.contracts import Encoding


@cache
def encodings() -> dict[str, Encoding]:
    """Those that a plan may ask for."""
    return _listed("ENCODINGS")


@cache
def readable() -> dict[str, Encoding]:
    """Those in which a matrix may be stored in a file."""
    return _listed("ENCODINGS") | _listed("STORED")


def _listed(name: str) -> dict[str, Encoding]:
    files = sorted(pkgutil.iter_modules(llama_fast.encodings.__path__), key=lambda file: file.name)
    modules = [import_module(f"{llama_fast.encodings.__name__}.{file.name}") for file in files]
    return {encoding.name: encoding for module in modules for encoding in getattr(module, name, ())}

"""The encodings by name, from the lists in the files of this folder.

`ENCODINGS = (Int8(),)` are those that a plan may ask for; `STORED = (Ggml("q4_k"),)` are read from files and made nowhere.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from types import ModuleType

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


def of_size(name: str) -> Encoding | None:
    """One whose name has sizes in it, as "int4-g64": a file reads these by its `of_name`. None for other names."""
    found = (module.of_name(name) for module in _modules() if hasattr(module, "of_name"))
    return next((encoding for encoding in found if encoding is not None), None)


def _listed(name: str) -> dict[str, Encoding]:
    return {encoding.name: encoding for module in _modules() for encoding in getattr(module, name, ())}


@cache
def _modules() -> list[ModuleType]:
    names = sorted(file.name for file in pkgutil.iter_modules(llama_fast.encodings.__path__))
    return [import_module(f"{llama_fast.encodings.__name__}.{name}") for name in names]

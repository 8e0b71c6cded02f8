"""Words to Plans: the encodings by name, and the plans that the command line, the ladder and the oracle all mean.

Leaves are imported where a plan asks for them, so that one that is not there is missed by nobody else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llama_fast.contracts import Encoding
from llama_fast.encodings.by_name import encodings, of_size
from llama_fast.plan import Plan
from llama_ref.arguments import text
from llama_ref.checkpoint import Checkpoint


def encoding_named(name: str) -> Encoding:
    """ "int8" -> Int8(), "int4-g64" -> Int4(64); ValueError that lists the names that stand for themselves.

    Others have sizes in them: a file of `encodings` reads these by its `of_name`.
    """
    found = encodings().get(text("encoding", name)) or of_size(name)
    if found is not None:
        return found
    raise ValueError(f"unknown encoding {name!r} (known: {', '.join(encodings())})")


def chosen_encoding(name: str | None, checkpoint: Checkpoint, fused: bool = False) -> Encoding:
    """The encoding called `name`; None: as the checkpoint is stored, but beneath our kernels a GGUF file's blocks are decoded."""
    return encoding_named(name or (checkpoint.encoding if fused else checkpoint.default_encoding))


def plan_named(name: str) -> Plan:
    """ "int8" -> the optimised plan with int8 weights; ValueError that lists the known names."""
    if name not in encodings():
        raise ValueError(f"plan={name!r} is no preset (known: {', '.join(encodings())}): for others write a Plan")
    return optimised(encodings()[name])


def optimised(encoding: Encoding | None = None, compile: bool = False) -> Plan:
    """The static cache and joined projections, with this encoding (dense by default), compiled or not."""
    from llama_fast.caches.static import Static

    plan = with_encoding(Plan(cache=Static(), fuse_projections=True), encoding)
    if not compile:
        return plan
    from llama_fast.compilers.compiled import Compiled

    return replace(plan, compiler=Compiled())


def fused(encoding: Encoding | None = None) -> Plan:
    """The static cache and our own kernels, replayed as a CUDA graph; needs a CUDA device."""
    from llama_fast.arithmetic.triton import Triton
    from llama_fast.compilers.graphed import Graphed

    return replace(optimised(encoding), compiler=Graphed(), arithmetic=Triton())


def paged(plan: Plan, tokens: int | None = None) -> Plan:
    """The plan with a cache of pages, for so many positions of all rows together."""
    from llama_fast.caches.paged import Paged

    return replace(plan, cache=Paged(tokens))


def check_cache_bits(bits: int | None) -> None:
    """ValueError for bits of keys and values that no cache keeps; None: those of the arithmetic."""
    if bits not in (None, 8):
        raise ValueError(f"--cache-bits {bits}: 8 is known")


def in_eight_bits(plan: Plan) -> Plan:
    """The plan with keys and values in eight bits, in the slots or pages that it has."""
    cache: Any = plan.cache
    if not hasattr(cache, "bits"):
        raise ValueError(f"a {type(cache).__name__} cache keeps no eight bits: take Static() or Paged()")
    return replace(plan, cache=replace(cache, bits=8))


def with_encoding(plan: Plan, encoding: Encoding | None) -> Plan:
    """The plan with another encoding, or as it is."""
    return plan if encoding is None else replace(plan, encoding=encoding)

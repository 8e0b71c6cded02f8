"""Words to Plans: the encodings by name, and the plans that the command line, the ladder and the oracle all mean."""

from __future__ import annotations

from llama_fast.arithmetic.triton import Triton
from llama_fast.caches.static import Static
from llama_fast.compilers.compiled import Compiled
from llama_fast.compilers.eager import Eager
from llama_fast.compilers.graphed import Graphed
from llama_fast.contracts import Encoding
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.plan import Plan
from llama_ref.arguments import text

ENCODINGS: dict[str, Encoding] = {kind.name: kind for kind in (Dense(), Int8())}


def encoding_named(name: str) -> Encoding:
    """ "int8" -> Int8(); ValueError that lists the known names."""
    if text("encoding", name) not in ENCODINGS:
        raise ValueError(f"unknown encoding {name!r} (known: {', '.join(ENCODINGS)})")
    return ENCODINGS[name]


def plan_named(name: str) -> Plan:
    """ "int8" -> the optimised plan with int8 weights; ValueError that lists the known names."""
    if name not in ENCODINGS:
        raise ValueError(f"plan={name!r} is no preset (known: {', '.join(ENCODINGS)}): for others write a Plan")
    return optimised(ENCODINGS[name])


def optimised(encoding: Encoding = Dense(), compile: bool = False) -> Plan:
    """The static cache and joined projections, with this encoding, compiled or not."""
    return Plan(encoding, cache=Static(), compiler=Compiled() if compile else Eager(), fuse_projections=True)


def fused(encoding: Encoding = Dense()) -> Plan:
    """The static cache and our own kernels, replayed as a CUDA graph; needs a CUDA device."""
    return Plan(encoding, cache=Static(), compiler=Graphed(), arithmetic=Triton(), fuse_projections=True)

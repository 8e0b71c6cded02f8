"""Words to Plans: the encodings by name, and the plans that the command line, the ladder and the oracle all mean."""

from __future__ import annotations

from llama_fast.optimisations.compiled import Compiled
from llama_fast.optimisations.fused import Fused
from llama_fast.optimisations.int8 import Int8
from llama_fast.optimisations.static_cache import Static
from llama_fast.plan import Dense, Eager, Encoding, Plan
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
    """The static cache and our own kernels; needs a CUDA device."""
    return Plan(encoding, cache=Static(), compiler=Fused(), fuse_projections=True)

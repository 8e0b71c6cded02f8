"""A Plan is one value that says which optimisations to apply; its slots name kinds, and the default of each is the plain one.

    Plan()                                                       eager, dense, a cache that grows: the baseline
    Plan(encoding=Int8(), cache=Static(), compiler=Compiled())   the source's third rung

A slot holds exactly one value, so "int8 and int4 together" cannot be written. The kinds are the leaves in `encodings`, `caches`,
`compilers`, `parallel` and `arithmetic`; they satisfy the Protocols of `contracts`, and no leaf imports another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_fast.arithmetic.pytorch import PyTorch
from llama_fast.caches.growing import Growing
from llama_fast.compilers.eager import Eager
from llama_fast.contracts import Arithmetic, Cache, Compiler, Encoding, Shard
from llama_fast.encodings.dense import Dense
from llama_fast.parallel.alone import Whole
from llama_ref.arguments import flag, made

SLOTS: dict[str, tuple[type, str]] = {
    "encoding": (Encoding, "an encoding, as Dense() or Int8()"),
    "cache": (Cache, "a kind of cache, as Growing() or Static()"),
    "compiler": (Compiler, "a compiler, as Eager(), Compiled() or Graphed()"),
    "shard": (Shard, "a shard, as Whole() or TensorParallel(rank, size)"),
    "arithmetic": (Arithmetic, "an arithmetic, as PyTorch() or Triton()"),
}
"""The contract of each slot, all of whose members its value must have, and what such a value is in words."""


@dataclass(frozen=True)
class Plan:
    """Which optimisations to apply. The default is the baseline: nothing."""

    encoding: Encoding = field(default_factory=Dense)
    cache: Cache = field(default_factory=Growing)
    compiler: Compiler = field(default_factory=Eager)
    shard: Shard = field(default_factory=Whole)
    arithmetic: Arithmetic = field(default_factory=PyTorch)
    fuse_projections: bool = False
    """q, k, v as one matrix and gate, up as another: fewer, larger products of the same numbers."""

    def __post_init__(self) -> None:
        for slot, (contract, wanted) in SLOTS.items():
            members = [name for name in vars(contract) if not name.startswith("_")]
            made(slot, getattr(self, slot), wanted, *members)
        object.__setattr__(self, "fuse_projections", flag("fuse_projections", self.fuse_projections))

    def __str__(self) -> str:
        """As "dense · growing · eager · whole"."""
        words = [
            self.encoding.name,
            type(self.cache).__name__.lower() + (" in 8 bits" if getattr(self.cache, "bits", None) else ""),
            *([self.arithmetic.name] if self.arithmetic.name else []),
            type(self.compiler).__name__.lower(),
            str(self.shard),
        ]
        return " · ".join([*words, "fused projections"] if self.fuse_projections else words)

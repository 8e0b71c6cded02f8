"""Words to the plan that is judged: every slot can be named by itself, and the ladder's rungs by their names."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llama_fast.plan import Plan
from llama_fast.recipes import check_cache_bits, encoding_named, fused, in_eight_bits, optimised, paged

CACHES = ("static", "growing", "paged")
PROJECTIONS = ("joined", "separate")


@dataclass(frozen=True)
class Words:
    """A plan as the command spells it. `draft` is that of the model that proposes tokens, where a rung has one."""

    encoding: str
    compiled: bool = False
    fused: bool = False
    cache: str = "static"
    projections: str = "joined"
    cache_bits: int | None = None

    def plan(self) -> Plan:
        """Raises ValueError, by name, for words that it does not know, or that exclude each other."""
        for flag, word, known in (("cache", self.cache, CACHES), ("projections", self.projections, PROJECTIONS)):
            if word not in known:
                raise ValueError(f"unknown {flag} {word!r} (known: {', '.join(known)})")
        if self.compiled and self.fused:
            raise ValueError("--fused and --compile are two ways to decode: choose one")
        encoding = encoding_named(self.encoding)
        plan = fused(encoding) if self.fused else optimised(encoding, self.compiled)
        if self.cache == "growing":
            plan = replace(plan, cache=Plan().cache)
        if self.cache == "paged":
            plan = paged(plan)
        if self.cache_bits is not None:
            if self.cache == "growing":
                raise ValueError("--cache-bits is for a static or a paged cache")
            check_cache_bits(self.cache_bits)
            plan = in_eight_bits(plan)
        return replace(plan, fuse_projections=self.projections == "joined")


def rung_plans(name: str, device: torch.device) -> tuple[Plan, Plan | None, int | None]:
    """The very plan that `llama-fast bench` times under a rung's name, and its draft's; of one that several ranks climb, how many
    stages they are (0: each is one), else None.
    """
    from llama_fast.ladder.rungs import rungs_named  # only here: the ladder stands above, and asks the oracle

    rungs = rungs_named(name, baseline=False)
    if len(rungs) != 1:
        raise ValueError(f"--rung {name!r}: name one rung")
    plan, draft = rungs[0].plans(device)
    if rungs[0].needs_gpu and device.type != "cuda":
        raise ValueError(f"--rung {name}: it needs a CUDA device")
    return plan, draft, rungs[0].stages if rungs[0].over_ranks else None

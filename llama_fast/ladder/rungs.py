"""The rungs of the ladder, as data: a later rung is one more entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama_fast.devices import default_dtype
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.fp8 import Fp8
from llama_fast.encodings.int4 import Int4
from llama_fast.encodings.int8 import Int8
from llama_fast.encodings.sparse24 import Sparse24
from llama_fast.plan import Plan
from llama_fast.recipes import fused, optimised


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: what it is called, what it does, the Plan that does it."""

    name: str
    does: str
    plan: Plan
    cpu_dtype: torch.dtype = torch.float32
    needs_gpu: bool = False
    needs_cpu: bool = False
    """Climbed on a CPU alone, and only when it is asked for: not every matrix is whole groups."""
    draft: Plan | None = None
    """Of the model that proposes tokens, with the same weights; None: plain decoding."""
    on_gpu: tuple[Plan, Plan | None] | None = None
    """Plan and draft on a GPU, where they are others than on a CPU."""
    over_ranks: bool = False
    """Climbed by several processes, each with its part of the plan's work."""
    stages: int = 1
    """Pipeline stages that those processes are; 0: each is one."""

    def stages_of(self, ranks: int) -> int:
        """How many stages so many processes are."""
        return self.stages or ranks

    def plans(self, device: torch.device) -> tuple[Plan, Plan | None]:
        """The plan on a device, and its draft's."""
        return self.on_gpu if self.on_gpu is not None and device.type == "cuda" else (self.plan, self.draft)

    def dtype(self, device: torch.device) -> torch.dtype:
        """The type it computes in; on a CPU a rung may differ from the baseline, and the report says so."""
        return self.cpu_dtype if device.type == "cpu" else default_dtype(device)


RUNGS = {
    rung.name: rung
    for rung in (
        Rung("baseline", "eager, q k v apart, a cache that grows", Plan()),
        Rung("compiled", "torch.compile, static cache", optimised(Dense(), compile=True)),
        Rung("int8", "the same, int8 weights", optimised(Int8(), compile=True)),
        Rung("int4", "the same, int4 in groups of 32", optimised(Int4(32), compile=True), needs_cpu=True),
        Rung(
            "speculative",
            "compiled, int8 draft of the same model (on a GPU both fused)",
            optimised(Dense(), compile=True),
            draft=optimised(Int8(), compile=True),
            on_gpu=(fused(Dense()), fused(Int8())),
        ),
        Rung("fused", "kernels of our own, one CUDA graph", fused(Dense()), needs_gpu=True),
        Rung("fused-int8", "the same, int8 weights", fused(Int8()), needs_gpu=True),
        Rung("fused-fp8", "the same, fp8 weights", fused(Fp8()), needs_gpu=True),
        Rung("fused-sparse24", "the same, 2:4 sparse weights", fused(Sparse24()), needs_gpu=True),
        Rung("fused-sparse24-int8", "the same, their values int8", fused(Sparse24(True)), needs_gpu=True),
        Rung("fused-int4", "the same, int4 weights in groups of 128", fused(Int4()), needs_gpu=True),
        Rung("fused-int4-g32", "the same, in groups of 32", fused(Int4(32)), needs_gpu=True),
        Rung(
            "fused-speculative-int4",
            "fused, int4 draft of the same model",
            fused(Dense()),
            draft=fused(Int4()),
            needs_gpu=True,
        ),
        Rung(
            "tp",
            "compiled (on GPUs fused), split over ranks",
            optimised(Dense(), compile=True),
            on_gpu=(fused(Dense()), None),
            over_ranks=True,
        ),
        Rung(
            "tp-int8",
            "the same, int8 weights",
            optimised(Int8(), compile=True),
            on_gpu=(fused(Int8()), None),
            over_ranks=True,
        ),
        Rung(
            "pp",
            "as tp, but a pipeline: each rank holds some layers",
            optimised(Dense(), compile=True),
            on_gpu=(fused(Dense()), None),
            over_ranks=True,
            stages=0,
        ),
        Rung(
            "tp-pp",
            "two stages, each split over ranks",
            optimised(Dense(), compile=True),
            on_gpu=(fused(Dense()), None),
            over_ranks=True,
            stages=2,
        ),
    )
}


def rungs_of(device: torch.device, encoding: str = "dense", launched: bool = False) -> list[Rung]:
    """All rungs that can be climbed on a device with a checkpoint that is stored so; on a CPU several ranks would only share
    what one has. By a rank of a job that was `launched`: those over ranks.
    """
    on_gpu = device.type == "cuda"
    several = on_gpu and torch.cuda.device_count() > 1
    # stages make one text no faster: they are climbed when asked for
    return [
        rung
        for rung in RUNGS.values()
        if (on_gpu or not rung.needs_gpu)
        and not rung.needs_cpu
        and (rung.over_ranks if launched else several or not rung.over_ranks)
        and rung.stages == 1
        and encoding in ("dense", rung.plans(device)[0].encoding.name)
    ]


def rungs_named(names: str, baseline: bool = True) -> list[Rung]:
    """ "baseline,int8" -> two rungs, the baseline first even if not named; ValueError that lists the known names."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in RUNGS]
    if unknown or not wanted:
        raise ValueError(f"unknown rung {', '.join(map(repr, unknown)) or repr(names)} (known: {', '.join(RUNGS)})")
    return [RUNGS[name] for name in dict.fromkeys([*(["baseline"] if baseline else []), *wanted])]

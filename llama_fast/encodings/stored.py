"""Each matrix as its checkpoint stores it: "q4_k" beside "q6_k" in one GGUF file. What a checkpoint holds as floats is dense."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_fast.encodings.dense import Dense


@dataclass(frozen=True)
class AsStored(Dense):
    """A plan's word for the encodings that a checkpoint names itself, matrix by matrix."""

    name: str = field(default="stored", init=False)


ENCODINGS = (AsStored(),)

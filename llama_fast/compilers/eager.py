"""No compiler: the two phases run as they are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from llama_fast.contracts import Phase


@dataclass(frozen=True)
class Eager:
    """Run the two phases as written."""

    records_addresses: ClassVar[bool] = False
    compiles_each_shape: ClassVar[bool] = False

    def compile(self, prefill: Phase, decode: Phase, model: nn.Module) -> tuple[Phase, Phase]:
        return prefill, decode

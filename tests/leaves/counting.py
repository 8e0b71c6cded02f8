"""A compiler that compiles nothing, and counts how often each phase is called."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llama_fast.contracts import Phase


@dataclass(frozen=True)
class Counting:
    calls: Counter[str] = field(default_factory=Counter, compare=False)
    records_addresses: ClassVar[bool] = False
    compiles_each_shape: ClassVar[bool] = False

    def compile(self, prefill: Phase, decode: Phase, model: Any) -> tuple[Phase, Phase]:
        def counted(name: str, phase: Phase) -> Phase:
            def call(*arguments: Any) -> Any:
                self.calls[name] += 1
                return phase(*arguments)

            return call

        return counted("prefill", prefill), counted("decode", decode)

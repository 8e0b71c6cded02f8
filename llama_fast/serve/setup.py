"""What is served, as one value of words and numbers: the flags of `llama-fast serve`, and what each of Ray's replicas is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from llama_fast import recipes
from llama_fast.build import build
from llama_fast.devices import dtype_named, where
from llama_fast.engine.speculation import Speculation
from llama_fast.llama import Llama
from llama_fast.parallel import ranks
from llama_fast.plan import Plan
from llama_fast.recipes import chosen_encoding
from llama_ref.models import DEFAULT_MODEL, resolve

CHUNK = 256
"""Tokens of prompts that a server reads between two steps."""
LONGEST = 2048
"""Positions of a row, unless more are asked for."""

Propose = Callable[[Plan, torch.device, torch.dtype], Speculation | None]
"""Makes what proposes tokens to a model of this plan; None: nothing does."""


@dataclass(frozen=True)
class Setup:
    """A model and how it is served. ValueError for what contradicts itself, before a model is sought."""

    model: str = DEFAULT_MODEL
    rows: int = 8
    """Texts that are generated at once."""
    length: int | None = None
    """Positions of a row, prompt and answer; None: 2048, or the context if shorter."""
    cache: str | None = None
    """ "static" or "paged"; None: paged on a CPU where nothing is compiled or drafted."""
    cache_tokens: int | None = None
    cache_bits: int | None = None
    """8: of keys and values; None: they have the type of the arithmetic."""
    chunk: int | None = None
    chat_template: str | None = None
    encoding: str | None = None
    compile: bool = False
    fused: bool = False
    device: str | None = None
    dtype: str | None = None
    drafted: bool = False
    """Whether something proposes tokens."""

    def __post_init__(self) -> None:
        if self.fused and self.compile:
            raise ValueError("--fused and --compile are two ways to decode: choose one")
        if self.cache not in (None, "static", "paged"):
            raise ValueError(f"unknown cache {self.cache!r} (known: static, paged)")
        if self.cache_tokens is not None and not self.paged:
            raise ValueError("--cache-tokens is for a paged cache: say --cache paged")
        recipes.check_cache_bits(self.cache_bits)

    @property
    def paged(self) -> bool:
        """Whether keys and values are kept in pages."""
        if self.cache is not None:
            return self.cache == "paged"
        return where(self.device).type == "cpu" and not self.compile and not self.drafted

    @property
    def warms_up(self) -> bool:
        """Whether the first request would wait for a compiler."""
        return self.compile or self.fused

    def opened(self, member: ranks.Member, propose: Propose | None = None) -> tuple[Llama, dict[str, Any]]:
        """The model on this member's device, and the settings of its engine. ValueError for what cannot be opened or built."""
        to, kind = member.device, dtype_named(self.dtype, member.device)
        found = ranks.one_after_another(lambda: resolve(self.model))
        checkpoint = found.open(to, kind)
        kept = chosen_encoding(self.encoding, checkpoint, self.fused)
        plan = recipes.fused(kept) if self.fused else recipes.optimised(kept, self.compile)
        plan = replace(plan, shard=member.shard)
        if self.paged:
            plan = recipes.paged(plan, self.cache_tokens)
        plan = recipes.in_eight_bits(plan) if self.cache_bits else plan
        draft = None if propose is None else propose(plan, to, kind)
        llama = Llama(build(checkpoint, plan, to, kind), found.tokenizer(), self.chat_template)
        length = self.length or min(LONGEST, llama.runner.config.max_context)
        chunk = CHUNK if self.chunk is None else self.chunk
        return llama, {"rows": self.rows, "length": length, "draft": draft, "chunk": chunk}

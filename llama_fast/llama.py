"""The face of the library: text in, text out.

from llama_fast import Llama
llama = Llama.from_pretrained("smollm2-135m")
print(llama.generate("Hello, my name is", max_new_tokens=20).text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch

from llama_fast.build import Runner, build, default_dtype, where
from llama_fast.generate import check, pad, stream
from llama_fast.optimisations.static_cache import Static
from llama_fast.plan import KVCache, Plan
from llama_fast.presets import encoding_named, optimised
from llama_fast.sampling import Sampling
from llama_fast.speculation import Speculation, Statistics
from llama_fast.text import TextStream
from llama_ref.models import DEFAULT_MODEL, resolve
from llama_ref.tokenizer import Tokenizer


@dataclass(frozen=True)
class Output:
    """One prompt's continuation.

    `finish_reason`: "stop" (an EOS id, or a stop string, which `text` leaves out) or "length". The two times belong to
    the whole call: a batch shares them.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    first_token_seconds: float
    total_seconds: float
    speculation: Statistics | None = None


@dataclass
class Row:
    """One prompt's continuation while it grows."""

    writer: TextStream
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    ended: bool = False

    def take(self, token: int, eos_ids: Sequence[int]) -> str:
        """Add a token; the text it completes."""
        self.tokens.append(token)
        self.pieces.append(self.writer.push(token))
        self.ended = self.writer.stopped or token in eos_ids
        return self.pieces[-1]

    def finish(self) -> str:
        """The text that was held back."""
        self.pieces.append(self.writer.finish())
        self.ended = self.ended or self.writer.stopped
        return self.pieces[-1]


class Llama:
    """A model, its tokenizer and a cache that is kept between calls."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer):
        self.runner = runner
        self.tokenizer = tokenizer
        self._cache: dict[int, KVCache] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        plan: Plan | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Llama:
        """Open a model (directory, GGUF file, hub id, "smollm2-135m", "random:NAME[:SEED]") and build it.

        The default plan keeps the checkpoint's encoding, with the static cache and joined projections, not compiled.
        Raises ValueError for what cannot be opened or built.
        """
        device = where(device)
        dtype = dtype or default_dtype(device)
        found = resolve(str(model))
        checkpoint = found.open(device, dtype)
        plan = plan or optimised(encoding_named(checkpoint.encoding))
        return cls(build(checkpoint, plan, device, dtype), found.tokenizer())

    @overload
    def generate(self, prompts: str, max_new_tokens: int = ..., **options: Any) -> Output: ...

    @overload
    def generate(self, prompts: Sequence[str], max_new_tokens: int = ..., **options: Any) -> list[Output]: ...

    def generate(  # type: ignore[misc]  # the overloads leave the options to this signature
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
        draft: Speculation | None = None,
    ) -> Output | list[Output]:
        """Continue one prompt, or several as a batch in which each row answers as it would alone.

        Temperature 0 is greedy. Row b draws with seed + b. A row ends at an EOS id of the checkpoint, before one of the
        `stop` strings, or after `max_new_tokens`. `on_text(row, piece)` is told the text as it comes.
        `draft` proposes tokens that are checked several at a time: `Draft(runner)`, `Ngram()`.
        """
        ids = [self.tokenizer.encode(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        rows = [Row(TextStream(self.tokenizer.decode, stop)) for _ in ids]
        eos_ids = self.runner.config.eos_ids
        began, first = time.perf_counter(), 0.0
        sampling = Sampling(temperature, top_k, top_p, seed)
        steps, counted = self._steps(ids, max_new_tokens, sampling, eos_ids, draft)
        for step in steps:
            first = first or time.perf_counter() - began
            for b, (row, token) in enumerate(zip(rows, step, strict=True)):
                if token is None or row.ended:
                    continue
                piece = row.take(token, eos_ids)
                if piece and on_text is not None:
                    on_text(b, piece)
            if all(row.ended for row in rows):
                break
        total = time.perf_counter() - began
        outputs = []
        for b, row in enumerate(rows):
            rest = row.finish()
            if rest and on_text is not None:
                on_text(b, rest)
            reason = "stop" if row.ended else "length"
            outputs.append(Output("".join(row.pieces), row.tokens, reason, len(ids[b]), first, total, counted))
        return outputs[0] if isinstance(prompts, str) else outputs

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        draft: Speculation | None = None,
    ) -> Iterator[str]:
        """The continuation's text in pieces as they come; joined, they are the text that `generate` returns."""
        ids = [self.tokenizer.encode(prompt)]
        row = Row(TextStream(self.tokenizer.decode, stop))
        eos_ids = self.runner.config.eos_ids
        sampling = Sampling(temperature, top_k, top_p, seed)
        for (token,) in self._steps(ids, max_new_tokens, sampling, eos_ids, draft)[0]:
            if token is not None and (piece := row.take(token, eos_ids)):
                yield piece
            if row.ended:
                break
        if rest := row.finish():
            yield rest

    @torch.no_grad()
    def score(self, texts: str | Sequence[str]) -> list[list[float]]:
        """The log-probability of every token after the first, for each text."""
        ids = [self.tokenizer.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        tokens_BT, lengths_B = pad(ids, self.runner.device)
        logits_BTV = self.runner.score(tokens_BT)
        scores = []
        for row, length, logits_TV in zip(tokens_BT, lengths_B.tolist(), logits_BTV, strict=True):
            logprob_TV = logits_TV[: length - 1].float().log_softmax(-1)
            scores.append(logprob_TV.gather(-1, row[1:length, None])[:, 0].tolist())
        return scores

    def _steps(
        self,
        ids: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
        eos_ids: Sequence[int],
        draft: Speculation | None,
    ) -> tuple[Iterator[list[int | None]], Statistics | None]:
        """The steps, and the counts that they fill in if there is a draft."""
        needed = check(self.runner, ids, max_new_tokens)
        if draft is None:
            cache = self._reusable_cache(len(ids), needed)
            return stream(self.runner, ids, max_new_tokens, sampling, eos_ids, cache), None
        cache = self._reusable_cache(len(ids), min(needed + draft.slack, self.runner.config.max_context))
        session = draft.begin(self.runner, ids, max_new_tokens, sampling, eos_ids, cache)
        return session.steps(), session.statistics

    def cache_length(self, batch: int) -> int | None:
        """Slots of the cache kept for this batch size; None if there is none."""
        return self._cache[batch].length if batch in self._cache else None

    def _reusable_cache(self, batch: int, length: int) -> KVCache | None:
        """The batch size's last cache if it is long enough: the same addresses and shapes, so compiled code stays."""
        if not isinstance(self.runner.plan.cache, Static):
            return None
        if batch not in self._cache or self._cache[batch].length < length:
            self._cache[batch] = self.runner.allocate(batch, length)
        return self._cache[batch]

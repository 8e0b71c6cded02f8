"""A `transformers` model and any callable as Subjects: code that is not ours.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oracle.subjects.adapters import Rows, greedy_by_recomputation, padded
from oracle.subjects.subject import Trace


class HFSubject:
    """A `transformers` causal language model, row by row, with its own cache and its own `generate`."""

    def __init__(self, model: Any, name: str = "transformers"):
        self.name = name
        self.model = model
        self.vocab_size: int = model.config.vocab_size
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device

    def _row(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.device)

    @torch.no_grad()
    def prefill_logits(self, rows: Rows) -> list[Tensor]:
        return [self.model(self._row(row)).logits[0] for row in rows]

    @torch.no_grad()
    def decode_logits(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        from transformers import DynamicCache

        named = inspect.signature(self.model.forward).parameters
        word = "cache" if "cache" in named else "past_key_values"  # up to transformers 5.23
        found = []
        for row, split in zip(rows, splits, strict=True):
            cache = {word: DynamicCache(config=self.model.config)}
            seen = [self.model(self._row(row[:split]), use_cache=True, **cache).logits[0, -1]]
            for token in row[split:]:
                seen.append(self.model(self._row([token]), use_cache=True, **cache).logits[0, -1])
            found.append(torch.stack(seen))
        return found

    @torch.no_grad()
    def greedy(self, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
        found = []
        for prompt in prompts:
            done = self.model.generate(
                self._row(prompt),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=self.device),
                max_new_tokens=n,
                min_new_tokens=None,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            found.append((done.sequences[0, len(prompt) :].tolist(), torch.cat(done.logits)))
        return found

    @torch.no_grad()
    def trace(self, rows: Rows, splits: Sequence[int]) -> list[Trace]:
        """Embedding, whole blocks but the last (which it shows after the final norm only), and logits, by prefill."""
        traces: list[Trace] = []
        for row in rows:
            out = self.model(self._row(row), output_hidden_states=True)
            *states, norm = (state[0] for state in out.hidden_states)
            traces.append(
                {"embedding": states[0], "norm": norm, "logits": out.logits[0]}
                | {f"layers.{i}": state for i, state in enumerate(states[1:])}
            )
        return traces


@dataclass
class CallableSubject:
    """Any function tokens [B, T] -> logits [B, T, V]; without a cache, so that decoding means recomputing."""

    function: Callable[[Tensor], Tensor]
    vocab_size: int
    dtype: torch.dtype
    name: str = "callable"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @torch.no_grad()
    def prefill_logits(self, rows: Rows) -> list[Tensor]:
        logits_BTV = self.function(padded(rows, self.device, self.vocab_size))
        return [logits_TV[: len(row)] for logits_TV, row in zip(logits_BTV, rows, strict=True)]

    def decode_logits(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        return [logits_TV[split - 1 :] for logits_TV, split in zip(self.prefill_logits(rows), splits, strict=True)]

    def greedy(self, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
        return greedy_by_recomputation(self, prompts, n)


def open_transformers(path: Path, dtype: torch.dtype, device: torch.device) -> HFSubject:
    """What `transformers` itself reads from a Hugging Face directory or a GGUF file."""
    from transformers import AutoModelForCausalLM

    where = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(where[0], dtype=dtype, **where[1])
    return HFSubject(model.to(device).eval())


def callable_named(name: str, vocab_size: int, dtype: torch.dtype, device: torch.device) -> CallableSubject:
    """ "package.module:function" -> its Subject; the function maps tokens [B, T] to logits [B, T, V]."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"subject {name!r} is none of ours, transformers, package.module:function")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"subject {name!r}: {error}") from error
    return CallableSubject(function, vocab_size, dtype, name, device)

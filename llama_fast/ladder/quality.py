"""What an encoding loses on a text: the oracle's statistics of drift, against the original weights in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.plan import Plan
from llama_fast.recipes import encoding_named
from llama_ref.checkpoint import Checkpoint
from oracle.statistics.drift import Drift, Tally, measure
from oracle.subjects.adapters import RefSubject, Weights
from oracle.subjects.fast import FastSubject

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class HeldOut:
    """Rows of tokens that nothing was fitted to, and the original model's logits [T, V] of each."""

    rows: Rows
    truth: Sequence[Tensor]
    device: torch.device

    @classmethod
    def of(cls, original: Checkpoint, rows: Rows, device: torch.device) -> HeldOut:
        """Logits by `llama_ref`, one row at a time. ValueError if no row has two tokens."""
        if not any(len(row) > 1 for row in rows):
            raise ValueError("the held-out text has no two tokens: nothing can be measured on it")
        weights = Weights(original.weights, None, device)
        reference = RefSubject(original.config, weights, torch.float32, device)
        return cls(rows, [reference.prefill_logits([row])[0] for row in rows], device)

    def tallies(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> list[Tally]:
        """How far a checkpoint's predictions are from the original's, of each row; computed in `dtype`."""
        runner = build(checkpoint, Plan(encoding=encoding_named(checkpoint.encoding)), self.device, dtype)
        subject = FastSubject(runner)
        return [
            Tally.of(subject.prefill_logits([row]), [true], [row])
            for row, true in zip(self.rows, self.truth, strict=True)
        ]

    def drift(self, checkpoint: Checkpoint) -> Drift:
        """The same as statistics of all rows together."""
        return drift_of(self.tallies(checkpoint))


def drift_of(tallies: Sequence[Tally]) -> Drift:
    """The statistics of several rows."""
    return measure(sum(tallies[1:], tallies[0]))


def told(drift: Drift) -> str:
    """In one line: "KLD 0.172 [0.156, 0.188], top-1 0.768 [...], perplexity x1.21 [...]"."""
    return f"KLD {drift.kld_mean}, top-1 {drift.top1_agreement}, perplexity x{drift.perplexity_ratio}"


def in_memory(original: Checkpoint, tensors: Mapping[str, Tensor], encoding: str) -> Checkpoint:
    """The checkpoint that a directory with these tensors would open as; `original.encodings` are its exceptions."""
    return Checkpoint(original.config, tensors, original.path, encoding, original.encodings)

"""Whether a product reads its stored matrix as it is, or one that was rounded to the type of the arithmetic.

An encoding promises integers that are exact and a scale after the sum. Who multiplies the two first, and rounds, errs about as
much as rounding the result does: its size does not give it away. Its direction does. What a rounded matrix would change in the
product is known, d = x @ (rounded - exact).T; the share of d in the subject's error e, <e, d> / <d, d>, is 1 of who rounds, and 0
up to chance of who does not, since other roundings know nothing of d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llama_ref.checkpoint import TensorSource
from oracle.questions.localise import Stages
from oracle.statistics.compare import Check, Verdict, empty
from oracle.subjects.adapters import RefSubject
from oracle.subjects.subject import Trace

PRODUCTS = ("q", "k", "v", "attention_out", "ffn_out", "logits")
MOST = 0.5
"""Half of what a rounded matrix would do: as far from the one as from the other."""
NOISE = 0.1
"""The largest standard error that says anything: five of them are `MOST`."""


class RoundedMatrices(Mapping[str, Tensor]):
    """Weights whose matrices are rounded to a type, as they must not be."""

    def __init__(self, weights: Mapping[str, TensorSource], dtype: torch.dtype):
        self._weights, self._dtype = weights, dtype

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name][:]
        return weight.to(self._dtype).to(weight.dtype) if weight.dim() == 2 else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def rounded_reference(truth: RefSubject, dtype: torch.dtype) -> RefSubject:
    """Truth with every matrix rounded to `dtype`: what a faulty kernel computes, in float64."""
    return RefSubject(truth.config, RoundedMatrices(truth.weights, dtype), torch.float64, truth.device, "rounded")


def judge_stored(
    rows: Sequence[Sequence[int]], traces: Sequence[Trace], truth: Stages, rounded: Stages, n_layers: int
) -> Verdict:
    """One check for each kind of product, over the first block, the last one and the head: kernels are the same in all."""
    shares: dict[str, tuple[float, float, str, int]] = {}
    for layer in sorted({0, n_layers - 1}):
        exact, other = truth.stages_of_block(layer, traces), rounded.stages_of_block(layer, traces)
        for kind in PRODUCTS[:-1]:
            name = f"layers.{layer}.{kind}"
            found = share_of(name, traces, exact, other)
            shares[kind] = max(shares.get(kind, found), found)
    shares["logits"] = share_of("logits", traces, *(one.stages_of_ends(rows, traces) for one in (truth, rounded)))
    checks = []
    for kind, (share, noise, where, count) in shares.items():
        if count and not noise <= NOISE:
            return empty(f"{kind}: stored numbers", f"{count} numbers tell it apart by {noise:.2g} only")
        checks.append(Check(f"{kind}: share of a rounded matrix's error", share, MOST, where, count))
    return Verdict(tuple(checks))


def share_of(
    name: str, traces: Sequence[Trace], exact: Sequence[Trace], other: Sequence[Trace]
) -> tuple[float, float, str, int]:
    """(share of the rounded matrix's error, its standard error, where, numbers compared); 0 where rounding changes nothing."""
    along = across = size = 0.0
    count = 0
    for seen, true, rounded in zip(traces, exact, other, strict=True):
        if name not in seen:
            continue
        e, d = seen[name].to(true[name].device).double() - true[name], rounded[name] - true[name]
        along, size = along + float((e * d).sum()), size + float(d.square().sum())
        across, count = across + float((e * d).square().sum()), count + e.numel()
    if not size:  # every number of the matrix is one of the type
        return 0.0, 0.0, name, count
    share = abs(along) / size
    return math.inf if math.isnan(share) else share, math.sqrt(across) / size, name, count

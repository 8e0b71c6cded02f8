"""Where a decode step's time goes, from a profiler's trace: matrix products, attention, the rest, and nothing at all.

On a GPU time is counted on the device: kernels that overlap (programmatic dependent launch) are counted once, and time
in which no kernel runs is a gap between two of them if it is short, else the host that did not keep up. On a CPU it is
the time of PyTorch's own operators, code that inductor generated being one of them. Times in microseconds (us).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from llama_fast.contracts import KVCache
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request
from llama_fast.engine.runner import Runner
from llama_fast.engine.speculation import Speculation
from llama_fast.ladder.bandwidth import synchronize

WAITS_FOR_HOST_US = 10.0
"""A longer time without a kernel is not the gap between two launches: the host was late."""

PROFILED, PROFILED_IN_ROUNDS = 8, 32
"""Tokens: a step is as another, but rounds of speculation differ."""

ATTENTION = re.compile(r"sdpa|flash|fmha|_attend|attention|softmax", re.IGNORECASE)
PRODUCTS = re.compile(
    r"gemm|gemv|gemvx|cutlass|nvjet|xmma|splitk|_in_registers|_on_tensor_cores|fused.*_mm|mkldnn::_linear"
    r"|aten::(linear|addmm|mm|mv|bmm|matmul)",
    re.IGNORECASE,
)
GENERATED = re.compile(r"CompiledFxGraph|Torch-Compiled|cpp_fused|^triton_")


@dataclass(frozen=True)
class Span:
    """Something that ran: its name, when it began and ended, us."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class StepTimes:
    """One token, us. `generated` is what a compiler wrote, products and all. `gaps` and `host` are time without a kernel;
    both 0 on a CPU."""

    total: float
    products: float
    attention: float
    generated: float
    other: float
    gaps: float
    host: float

    def __str__(self) -> str:
        """As "4390 us a token: products 4105, attention 180, gaps 60"; what is 0 is left out."""
        parts = [(name, value) for name, value in vars(self).items() if name != "total" and value >= 0.5]
        return f"{self.total:.0f} us a token: " + ", ".join(f"{name} {value:.0f}" for name, value in parts)


def kind(name: str) -> str:
    """What a kernel or operator does: "_attend" -> "attention", "nvjet_tst_64x8" -> "products"."""
    if GENERATED.search(name):
        return "generated"
    if ATTENTION.search(name):
        return "attention"
    return "products" if PRODUCTS.search(name) else "other"


def account(window: Span, spans: Iterable[Span], steps: int) -> StepTimes:
    """What happened in `window`, divided by `steps`. A span counts from where the ones before it ended."""
    sums = {"products": 0.0, "attention": 0.0, "generated": 0.0, "other": 0.0, "gaps": 0.0, "host": 0.0}
    reached = window.start

    def idle(until: float) -> None:
        if until > reached:
            sums["host" if until - reached >= WAITS_FOR_HOST_US else "gaps"] += until - reached

    for span in sorted(spans, key=lambda span: span.start):
        if span.end <= reached or span.start >= window.end:
            continue
        idle(span.start)
        sums[kind(span.name)] += span.end - max(span.start, reached)
        reached = span.end
    idle(window.end)
    total = max(window.end, reached) - window.start
    return StepTimes(total / steps, **{name: value / steps for name, value in sums.items()})


@dataclass(frozen=True)
class Decoder:
    """What is to be profiled: a runner with its cache (None: a new one), alone or with somebody who proposes."""

    name: str
    runner: Runner
    cache: KVCache | None = None
    draft: Speculation | None = None


def profile_decoding(
    decoders: Sequence[Decoder], prompt: Sequence[int], trace: Path, new_tokens: int = 64
) -> dict[str, StepTimes]:
    """Decode some tokens, half of `new_tokens` at most, with each under the profiler, write one Chrome trace, account for each.

    A rung's tokens stand in the trace under its name. Raises OSError where `trace` cannot be written.
    """
    check_trace(trace)
    on_gpu = decoders[0].runner.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        decoded = {decoder.name: decode_some(decoder, prompt, new_tokens) for decoder in decoders}
    profiler.export_chrome_trace(str(trace))
    events = list(profiler.events() or [])
    return {name: step_times(events, label(name), tokens, on_gpu) for name, tokens in decoded.items()}


def check_trace(trace: Path) -> None:
    """OSError where a trace cannot be written; its folder is made."""
    trace.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(trace.parent, os.W_OK) or trace.is_dir():
        raise OSError(f"cannot write the trace {trace}")


def label(name: str) -> str:
    return f"decode: {name}"


def decode_some(decoder: Decoder, prompt: Sequence[int], new_tokens: int) -> int:
    """Decode under a label. Returns the tokens that were decoded there: of rounds of speculation all that they brought.

    What is on its way to the device when the label begins is made up for by what is when it ends.
    """
    request = Request(prompt, new_tokens)
    engine = Engine(decoder.runner, 1, request.positions, decoder.cache, decoder.draft)
    engine.add(request)
    wanted = min(PROFILED_IN_ROUNDS if decoder.draft else PROFILED, new_tokens // 2)
    seen = 0
    while seen < min(2, new_tokens - wanted):  # the prefill and a step: from here on always as much is on its way
        seen += len(engine.step())
    before, seen = engine.statistics.decoded if engine.statistics else 0, 0
    synchronize(decoder.runner.device)
    with record_function(label(decoder.name)):
        while engine.busy and seen < wanted:
            seen += len(engine.step())
        synchronize(decoder.runner.device)
    decoded = engine.statistics.decoded - before if engine.statistics else seen
    engine.close()
    return max(1, decoded)


def step_times(events: Sequence[Any], under: str, steps: int, on_gpu: bool) -> StepTimes:
    """The account of the steps that the profiler recorded under a label."""
    own = [e for e in events if e.name == under and e.device_type == DeviceType.CPU]
    assert len(own) == 1, f"{len(own)} records of {under!r}"
    window = Span(under, own[0].time_range.start, own[0].time_range.end)
    if on_gpu:
        device = DeviceType.CUDA
        spans = [Span(e.name, e.time_range.start, e.time_range.end) for e in events if e.device_type == device]
        return account(window, (s for s in spans if not s.name.startswith(label(""))), steps)
    sums = {"products": 0.0, "attention": 0.0, "generated": 0.0, "other": 0.0}
    inside = [e for e in events if window.start <= e.time_range.start and e.time_range.end <= window.end]
    for event in inside:
        sums[kind(event.name)] += event.self_cpu_time_total
    return StepTimes((window.end - window.start) / steps, **{k: v / steps for k, v in sums.items()}, gaps=0.0, host=0.0)

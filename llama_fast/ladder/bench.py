"""Climb the ladder: build every rung, judge it, measure all of them in turns, and say what stands in the way.

Each round takes one sample of every rung that fits into the memory, so that a machine that slows down slows all of them.
Compilation is timed by itself. A sample is one prompt continued greedily by a fixed number of tokens, whatever the EOS ids say.
"""

from __future__ import annotations

import gc
import platform
import re
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from llama_fast.build import build, rebuild
from llama_fast.engine.caches import Caches
from llama_fast.engine.generate import Generation, generate
from llama_fast.engine.request import check_request
from llama_fast.engine.runner import Runner
from llama_fast.engine.speculation import Speculation, Statistics
from llama_fast.ladder.bandwidth import Wall, synchronize
from llama_fast.ladder.profiling import Decoder, StepTimes, check_trace, profile_decoding
from llama_fast.ladder.rungs import Rung
from llama_fast.model.roofline import (
    DATASHEET_GB_PER_S,
    GB,
    cache_bytes_per_step,
    floor_steps_per_second,
    mbu,
    stored_bytes,
    weight_bytes_per_step,
)
from llama_fast.plan import Plan
from llama_fast.speculative.proposers import Draft
from llama_ref.checkpoint import Checkpoint

Judge = Callable[..., str]
"""Says whether a runner agrees with the reference, "AGREE" or another word: (runner, length of its static cache or None), and
the draft as a third argument where there is one."""

WARM_UP_TOKENS = 8


class Progress(Protocol):
    """Who is told what happens: a live display, or nobody."""

    def say(self, text: str) -> None: ...

    def sample(self, rung: str, tokens_per_second: float) -> None: ...


@dataclass(frozen=True)
class Work:
    """What every rung is measured by: `samples` continuations of one prompt's ids by `new_tokens`.

    With `trace`, some tokens of every rung are decoded once more under a profiler that writes there.
    """

    prompt: Sequence[int]
    new_tokens: int = 200
    samples: int = 5
    trace: Path | None = None

    @property
    def positions(self) -> int:
        return len(self.prompt) + self.new_tokens


@dataclass(frozen=True)
class Witnesses:
    """Who says whether a rung is right, and who is told what happens."""

    judge: Judge
    progress: Progress


@dataclass(frozen=True)
class Spread:
    """Median, least and most of the samples."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class RungResult:
    """One line of `ladder.json`. Times in the units of their names; MBU against the measured read bandwidth."""

    name: str
    does: str
    plan: str
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    cache_length: int
    tokens_per_second: Spread
    decode_tokens_per_second: float
    time_to_first_token_ms: float
    bandwidth_gb_per_s: float
    mbu: float
    peak_memory_gb: float
    weights_gb: float
    compile_seconds: float
    floor_tokens_per_second: float
    verdict: str
    step_times_us: dict[str, float] | None = None
    """Where a decode step's time went, by `llama_fast.ladder.profiling`, if asked for."""
    draft_memory_gb: float = 0.0
    """The part of the memory that is the draft's: its weights and cache."""
    speculation: dict[str, Any] | None = None
    """All samples' counts, where tokens were proposed."""
    ranks: int = 1
    """Processes that shared the work; bandwidth, MBU, floor, weights and peak memory are those of rank 0."""
    memory_by_rank_gb: list[float] | None = None


@dataclass(frozen=True)
class Ladder:
    """A bench run: the machine, what was asked, one result per rung."""

    model: str
    device: str
    torch: str
    python: str
    threads: int
    samples: int
    sampling: str
    read_bandwidth_gb_per_s: float
    datasheet_bandwidth_gb_per_s: float | None
    resident_memory_gb: float
    rungs: list[RungResult]
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a rung that was asked for is not there: it did not fit into the memory, or does not divide over the ranks."""

    def as_json(self) -> dict[str, Any]:
        """The content of `ladder.json`."""
        return asdict(self)


@dataclass
class Climber:
    """A rung that was built: its runner, the caches it keeps, and its samples so far."""

    rung: Rung
    runner: Runner
    caches: Caches
    draft: Draft | None = None
    compile_seconds: float = 0.0
    peak_memory_bytes: float = 0.0
    verdict: str = ""
    samples: list[Generation] = field(default_factory=list)


def bench(
    checkpoint: Checkpoint,
    model: str,
    rungs: Sequence[Rung],
    device: torch.device,
    work: Work,
    witnesses: Witnesses,
) -> Ladder:
    """Measure `rungs` on `device`. Raises ValueError if the work does not fit the model.

    Where a GPU does not hold all rungs at once, they are measured in groups that fit, each with a trace of its own (another
    group's: "-more" added); OSError if it cannot be written.
    """
    progress = witnesses.progress
    if work.trace is not None:
        check_trace(work.trace)
    check_request(checkpoint.config, [work.prompt], work.new_tokens)  # before a minute is spent on the bandwidth
    progress.say("measuring the read bandwidth")
    wall = Wall(device)
    waiting, left_out, results = deque(rungs), dict[str, str](), list[RungResult]()
    while waiting:
        builder = Builder(checkpoint, device)
        results += climb(waiting, left_out, builder, work, witnesses, wall)
        work = replace(work, trace=work.trace and work.trace.with_stem(f"{work.trace.stem}-more"))
        if waiting:
            builder.release()
    return Ladder(
        model=model,
        device=device_name(device),
        torch=torch.__version__,
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        samples=work.samples,
        sampling="greedy",
        read_bandwidth_gb_per_s=wall.gb_per_s,
        datasheet_bandwidth_gb_per_s=DATASHEET_GB_PER_S.get(device_name(device)),
        resident_memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB,
        rungs=[against(rung, wall.gb_per_s) for rung in results],
        left_out=left_out,
    )


def climb(
    waiting: deque[Rung],
    left_out: dict[str, str],
    builder: Builder,
    work: Work,
    witnesses: Witnesses,
    wall: Wall,
) -> list[RungResult]:
    """Measure, in turns, the first rungs of `waiting` that fit into the memory together, and take them from it."""
    progress = witnesses.progress
    climbers = those_that_fit(waiting, left_out, builder, work, witnesses)
    for round_number in range(work.samples):
        for climber in climbers:
            progress.say(f"sample {round_number + 1} of {work.samples}: {climber.rung.name}")
            climber.samples.append(sample(climber, work, work.new_tokens))
            progress.sample(climber.rung.name, climber.samples[-1].tokens_per_second)
        wall.look_again()
    times: dict[str, StepTimes] = {}
    if work.trace is not None and climbers:
        progress.say("profiling")
        decoders = [Decoder(c.rung.name, c.runner, c.caches.take(1, room(c, work)), c.draft) for c in climbers]
        times = profile_decoding(decoders, work.prompt, work.trace, work.new_tokens)
        for decoder, climber in zip(decoders, climbers, strict=True):
            if decoder.cache is not None:
                climber.caches.put_back(decoder.cache)
    return [result(climber, work, wall.gb_per_s, times.get(climber.rung.name)) for climber in climbers]


class Builder:
    """Builds a plan once, and weights once, however many rungs stand on them: one that speculates uses those of two others."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self.checkpoint, self.device = checkpoint, device
        self.built: list[Runner] = []

    def __call__(self, plan: Plan, dtype: torch.dtype) -> Runner:
        for runner in self.built:
            if (runner.plan, runner.dtype) == (plan, dtype):
                return runner
        for runner in self.built:
            if (replace(runner.plan, cache=plan.cache, compiler=plan.compiler), runner.dtype) == (plan, dtype):
                self.built.append(rebuild(runner, plan))
                return self.built[-1]
        self.built.append(build(self.checkpoint, plan, self.device, dtype))
        return self.built[-1]

    def release(self) -> None:
        """Give back the memory of all that was built, and of what was compiled for it."""
        self.built.clear()
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def those_that_fit(
    waiting: deque[Rung], left_out: dict[str, str], builder: Builder, work: Work, witnesses: Witnesses
) -> list[Climber]:
    """Prepare rungs, and take them from `waiting`, until one does not fit beside those before it: it waits until they are
    measured. One that does not fit alone is left out; of a rung over ranks that is an error, as all ranks must go one way.
    """
    climbers: list[Climber] = []
    progress = witnesses.progress
    while waiting:
        try:
            climbers.append(prepare(builder, waiting[0], work, witnesses))
        except torch.OutOfMemoryError:
            if waiting[0].over_ranks:
                raise
            if climbers:
                progress.say(f"{waiting[0].name}: does not fit beside the rungs before it, which are measured now")
                break
            left_out[waiting[0].name] = "does not fit into the GPU's memory"
            progress.say(f"{waiting[0].name}: left out, {left_out[waiting[0].name]}")
            builder.built.clear()
        waiting.popleft()
    return climbers


def prepare(builder: Builder, rung: Rung, work: Work, witnesses: Witnesses) -> Climber:
    """Build a rung, compile it by a first generation, measure its memory alone, have it judged."""
    progress = witnesses.progress
    gc.collect()  # also what an attempt that did not fit has left
    device, before = builder.device, [runner.model for runner in builder.built]
    held = device_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    progress.say(f"{rung.name}: building")
    plan, small = rung.plans(device)
    runner = builder(plan, rung.dtype(device))
    draft = Draft(builder(small, rung.dtype(device))) if small is not None else None
    mine = [runner, *([draft.runner] if draft else [])]
    shared_bytes = sum(stored_bytes(used.model) for used in mine if any(used.model is known for known in before))
    climber = Climber(rung, runner, Caches(runner), draft)
    progress.say(f"{rung.name}: first tokens (compilation, if any)")
    first = timed(climber, work, device)
    again = timed(climber, work, device)
    climber.compile_seconds = max(0.0, first - again)
    if device.type == "cuda":
        sample(climber, work, work.new_tokens)
        climber.peak_memory_bytes = torch.cuda.max_memory_allocated(device) - held + shared_bytes
    else:
        cache_bytes = cache_bytes_per_step(
            runner.config, 1, climber.caches.length(1) or room(climber, work), runner.dtype.itemsize
        )
        climber.peak_memory_bytes = stored_bytes(runner.model) + cache_bytes + (draft.held_bytes if draft else 0)
    progress.say(f"{rung.name}: asking the oracle")
    climber.verdict = witnesses.judge(runner, climber.caches.length(1), *([draft] if draft else []))
    progress.say(f"{rung.name}: {climber.verdict}")
    return climber


def timed(climber: Climber, work: Work, device: torch.device) -> float:
    began = time.perf_counter()
    sample(climber, work, WARM_UP_TOKENS)
    synchronize(device)
    return time.perf_counter() - began


def sample(climber: Climber, work: Work, new_tokens: int) -> Generation:
    """One continuation. A static cache stays, with the addresses that were compiled; one that grows is made anew."""
    cache = climber.caches.take(1, room(climber, work))
    done = generate(climber.runner, [work.prompt], new_tokens, cache=cache, draft=climber.draft)
    climber.caches.put_back(cache)
    return done


def room(climber: Climber, work: Work) -> int:
    """Positions that the cache of a rung needs."""
    return work.positions + (climber.draft.slack if climber.draft is not None else 0)


def result(climber: Climber, work: Work, bandwidth: float, times: StepTimes | None) -> RungResult:
    runner = climber.runner
    rates = [generation.tokens_per_second for generation in climber.samples]
    rate = statistics.median(rates)
    mean_positions = len(work.prompt) + work.new_tokens / 2
    step_bytes = weight_bytes_per_step(runner.model) + cache_bytes_per_step(
        runner.config, 1, mean_positions, runner.dtype.itemsize
    )
    counted = [generation.speculation for generation in climber.samples if generation.speculation]
    total = sum(counted[1:], counted[0]) if counted else None
    if total is not None and climber.draft is not None:
        step_bytes = bytes_per_token(step_bytes, total, climber.draft)
    return RungResult(
        name=climber.rung.name,
        does=climber.rung.does,
        plan=str(runner.plan),
        dtype=str(runner.dtype).removeprefix("torch."),
        batch=1,
        prompt_tokens=len(work.prompt),
        new_tokens=work.new_tokens,
        cache_length=climber.caches.length(1) or work.positions,
        tokens_per_second=Spread(rate, min(rates), max(rates)),
        decode_tokens_per_second=statistics.median(g.decode_tokens_per_second for g in climber.samples),
        time_to_first_token_ms=statistics.median(g.first_token_seconds for g in climber.samples) * 1e3,
        bandwidth_gb_per_s=step_bytes * rate / GB,
        mbu=mbu(step_bytes, rate, bandwidth),
        peak_memory_gb=climber.peak_memory_bytes / GB,
        weights_gb=stored_bytes(runner.model) / GB,
        compile_seconds=climber.compile_seconds,
        floor_tokens_per_second=floor_steps_per_second(step_bytes, bandwidth),
        verdict=climber.verdict,
        step_times_us=asdict(times) if times else None,
        draft_memory_gb=climber.draft.held_bytes / GB if climber.draft else 0.0,
        speculation=total.as_json() if total else None,
    )


def against(rung: RungResult, bandwidth_gb_per_s: float) -> RungResult:
    """The result with another measurement of the read bandwidth."""
    share = rung.bandwidth_gb_per_s / bandwidth_gb_per_s
    return replace(rung, mbu=share, floor_tokens_per_second=rung.tokens_per_second.median / share)


def bytes_per_token(step_bytes: float, counted: Statistics, draft: Speculation) -> float:
    """Bytes read for a decoded token: the target's for every check and plain step, the draft's for every proposal."""
    steps = counted.rounds + counted.plain_steps
    return (steps * step_bytes + draft.read_bytes(counted)) / max(1, counted.emitted + counted.plain_steps)


def device_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's and the number of threads used: "AMD EPYC, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"

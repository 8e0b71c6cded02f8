"""What a person sees: a live line while the ladder is climbed, a table at the end, and the summary of a generation."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.live import Live as RichLive
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table

from llama_fast.engine.speculation import Speculation, Statistics
from llama_fast.ladder.bench import Ladder, RungResult, bytes_per_token
from llama_fast.ladder.profiling import StepTimes
from llama_fast.llama import Llama, Output
from llama_fast.model.roofline import GB, cache_bytes_per_step, stored_bytes, weight_bytes_per_step


class Live:
    """A spinner with what happens now and the samples so far; plain lines where there is no terminal."""

    def __init__(self, model: str):
        self._console = Console()
        self._samples: dict[str, list[float]] = {}
        self._console.print(f"[bold]{escape(model)}[/bold]: climbing the ladder")
        self._live = RichLive(console=self._console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Live:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(f"  {text}", highlight=False, markup=False)
            return
        rates = "   ".join(f"{name} {statistics.median(seen):.1f} tok/s" for name, seen in self._samples.items())
        self._live.update(Spinner("dots", f"{escape(text)}   [dim]{rates}[/dim]"))

    def sample(self, rung: str, tokens_per_second: float) -> None:
        self._samples.setdefault(rung, []).append(tokens_per_second)


def show_table(ladder: Ladder) -> None:
    """The ladder as a table, and the machine it stands on."""
    first = ladder.rungs[0]
    table = Table(title=escape(f"{ladder.model} on {ladder.device}"), title_justify="left")
    table.add_column("rung")
    for heading in (
        "tokens/s",
        "(min-max)",
        "speed-up",
        "of floor",
        "GB/s",
        "memory GB",
        "first token ms",
        "compile s",
    ):
        table.add_column(heading, justify="right")
    table.add_column("oracle")
    for rung in ladder.rungs:
        table.add_row(*row(rung, first))
    console = Console(width=max(Console().width, 118))
    console.print(table)
    sheet = ladder.datasheet_bandwidth_gb_per_s
    console.print(
        f"floor: bytes read per token / read bandwidth measured now, {ladder.read_bandwidth_gb_per_s:,.1f} GB/s"
        + (f" (datasheet {sheet:,.0f})" if sheet else ""),
        highlight=False,
    )
    console.print(
        f"batch 1, prompt of {first.prompt_tokens} tokens, {first.new_tokens} new tokens, greedy, "
        f"median of {ladder.samples} samples taken in turns, compilation apart; torch {ladder.torch}",
        highlight=False,
    )
    for name, reason in ladder.left_out.items():
        console.print(f"{name}: left out, {reason}", highlight=False)
    for rung in ladder.rungs:
        if rung.speculation is not None:
            console.print(told(rung), highlight=False)
    for rung in ladder.rungs:
        if rung.memory_by_rank_gb is not None:
            memory = ", ".join(f"{of_rank:.2f}" for of_rank in rung.memory_by_rank_gb)
            total = sum(rung.memory_by_rank_gb)
            console.print(f"{rung.name}: {rung.ranks} ranks, memory {memory}, in all {total:.2f} GB", highlight=False)
    console.print(f"resident memory of the process with all rungs: {ladder.resident_memory_gb:.2f} GB", highlight=False)


def told(rung: RungResult) -> str:
    """What its draft did and costs, in a line."""
    counted = rung.speculation or {}
    overhead = rung.draft_memory_gb / (rung.peak_memory_gb - rung.draft_memory_gb)
    rates = f"acceptance {counted['acceptance']:.1%}, {counted['tokens_per_round']:.2f} tokens per round"
    did = f"{rates} ({counted['rounds']} rounds, {counted['plain_steps']} plain steps)"
    line = f"{rung.name}: draft {rung.draft_memory_gb:.2f} GB (+{overhead:.1%}); {did}"
    return f"{line}; {counted['notice']}" if counted["notice"] else line


def show_step_times(ladder: Ladder) -> None:
    """Every profiled rung in a line: what a step must read, the time that takes, and where the rest went."""
    for rung in ladder.rungs:
        if rung.step_times_us is None:
            continue
        floor_us, times = 1e6 / rung.floor_tokens_per_second, StepTimes(**rung.step_times_us)
        read = floor_us * ladder.read_bandwidth_gb_per_s / 1e6
        print(
            f"{rung.name}: {times}; floor {floor_us:.0f} us ({read:.3f} GB), {floor_us / times.total:.0%} of that speed"
        )


def row(rung: RungResult, first: RungResult) -> list[str]:
    name = rung.name if rung.dtype == first.dtype else f"{rung.name} ({rung.dtype})"
    rate = rung.tokens_per_second
    colour = "green" if rung.verdict == "AGREE" else "red"
    return [
        name,
        f"{rate.median:.1f}",
        f"{rate.min:.1f}-{rate.max:.1f}",
        f"{rate.median / first.tokens_per_second.median:.2f}x",
        f"{rate.median / rung.floor_tokens_per_second:.0%}",
        f"{rung.bandwidth_gb_per_s:.1f}",
        f"{rung.peak_memory_gb:.2f}" + (f" x{rung.ranks}" if rung.ranks > 1 else ""),
        f"{rung.time_to_first_token_ms:.0f}",
        f"{rung.compile_seconds:.1f}",
        f"[{colour}]{rung.verdict}[/{colour}]",
    ]


@dataclass(frozen=True)
class Summary:
    """Speed, bandwidth and memory of some generations with one prompt each. GB = 1e9 bytes."""

    tokens_per_second: float
    decode_tokens_per_second: float
    first_token_ms: float
    bandwidth_gb_per_s: float
    memory_gb: float
    resident_memory_gb: float
    on_gpu: bool
    draft_memory_gb: float = 0.0
    speculation: Statistics | None = None

    @classmethod
    def of(cls, llama: Llama, outputs: Sequence[Output], draft: Speculation | None = None) -> Summary:
        runner = llama.runner
        new_tokens = sum(len(output.tokens) for output in outputs)
        rate = new_tokens / sum(output.total_seconds for output in outputs)
        decoded = sum(len(output.tokens) - 1 for output in outputs)
        decode_seconds = sum(output.total_seconds - output.first_token_seconds for output in outputs)
        positions = outputs[0].prompt_tokens + new_tokens / len(outputs) / 2
        read = cache_bytes_per_step(runner.config, 1, positions, runner.dtype.itemsize)
        on_gpu = runner.device.type == "cuda"
        longest = max(output.prompt_tokens + len(output.tokens) for output in outputs)
        slots = llama.cache_length(1) or longest
        counted = [output.speculation for output in outputs if output.speculation]
        of_draft = draft.held_bytes if draft is not None else 0
        held = stored_bytes(runner.model) + cache_bytes_per_step(runner.config, 1, slots, runner.dtype.itemsize)
        held += of_draft
        step_bytes = weight_bytes_per_step(runner.model) + read
        total = sum(counted[1:], counted[0]) if counted else None
        if total is not None and draft is not None:
            step_bytes = bytes_per_token(step_bytes, total, draft)
        return cls(
            tokens_per_second=rate,
            decode_tokens_per_second=decoded / decode_seconds if decoded else 0.0,
            first_token_ms=statistics.median(output.first_token_seconds for output in outputs) * 1e3,
            bandwidth_gb_per_s=step_bytes * rate / GB,
            memory_gb=(torch.cuda.max_memory_allocated(runner.device) if on_gpu else held) / GB,
            resident_memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB,
            on_gpu=on_gpu,
            draft_memory_gb=of_draft / GB,
            speculation=total,
        )

    def lines(self) -> list[str]:
        """The lines that scripts read, and what stands beside them."""
        lines = [
            f"Average tokens/sec: {self.tokens_per_second:.2f}",
            f"Bandwidth achieved: {self.bandwidth_gb_per_s:.2f} GB/s",
            f"Memory used: {self.memory_gb:.2f} GB",
            f"Decode tokens/sec: {self.decode_tokens_per_second:.2f}, first token after {self.first_token_ms:.0f} ms",
        ]
        if not self.on_gpu:
            lines.append(f"Resident memory: {self.resident_memory_gb:.2f} GB")
        if self.draft_memory_gb:
            overhead = self.draft_memory_gb / (self.memory_gb - self.draft_memory_gb)
            lines.append(f"Of this the draft: {self.draft_memory_gb:.2f} GB (+{overhead:.1%})")
        return lines + (self.speculation.lines() if self.speculation is not None else [])

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("on_gpu", "speculation")}

"""What inductor's options do to a decode step: a few layers of the 7B shape, step time and the longest kernels of each.

    python tests/gpu/compile_options.py

Not a test: about half a minute of compilation a variant. The winner stands in `llama_fast/optimisations/compiled.py`.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from llama_fast.bandwidth import read_bandwidth_gb_per_s
from llama_fast.build import build
from llama_fast.optimisations import compiled
from llama_fast.optimisations.int8 import Int8
from llama_fast.plan import Dense, Encoding
from llama_fast.presets import optimised
from llama_fast.sampling import Chooser, Sampling
from llama_ref.checkpoint import Checkpoint, random_checkpoint
from llama_ref.models import open_model

LAYERS = 4
CUDA = torch.device("cuda")
VARIANTS: dict[str, compiled.Options] = {
    "as shipped": {},
    "inputs not stored": {"realize_acc_reads_threshold": 8, "realize_opcount_threshold": 30},  # inductor's defaults
    "more reduction tiles": {"max_autotune_pointwise": True},
}


def main() -> None:
    config = dataclasses.replace(open_model("random:llama-2-7b", CUDA, torch.bfloat16).config, n_layers=LAYERS)
    checkpoint = random_checkpoint(config, 0, CUDA, torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}, read {read_bandwidth_gb_per_s(CUDA):.0f} GB/s, {LAYERS} layers")
    shipped = dict(compiled.GPU_OPTIONS)
    for encoding in (Dense(), Int8()):
        for name, options in VARIANTS.items():
            torch._dynamo.reset()
            compiled.GPU_OPTIONS.update(shipped)
            compiled.GPU_OPTIONS.update(options)
            measure(checkpoint, encoding, name)


def measure(checkpoint: Checkpoint, encoding: Encoding, name: str) -> None:
    """Compile a decode step, time rounds of it, and list its longest kernels."""
    began = time.perf_counter()
    runner = build(checkpoint, optimised(encoding, compile=True), CUDA)
    cache, choose = runner.allocate(1, 256), Chooser(Sampling(), [0], CUDA)
    token_BT, start_B = torch.tensor([[5]], device=CUDA), torch.tensor([100], device=CUDA)

    def steps(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            runner.step(token_BT, start_B, cache, choose)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count * 1e6

    steps(4)
    compile_seconds = time.perf_counter() - began
    times = [steps(40) for _ in range(7)]
    spread = f"[{min(times):.0f}, {max(times):.0f}]"
    print(f"{encoding.name}, {name}: {statistics.median(times):.0f} us {spread}, compiled in {compile_seconds:.0f} s")
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        steps(5)
    for event in sorted(seen.key_averages(), key=lambda event: -event.device_time_total)[:14]:
        print(f"  {event.device_time_total / 5:8.1f} us in {event.count // 5:3d}  {event.key[:100]}")


if __name__ == "__main__":
    main()

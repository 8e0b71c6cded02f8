"""What inductor's options do to a decode step: a few layers of the 7B shape, step time and the longest kernels of each.

    python tests/instruments/compile_options.py [ROUNDS]

Not a test: some 20 s of compilation a variant and round, nothing cached, for the tuner does not choose the same tiles twice. The
winner stands in `llama_fast/compilers/compiled.py`.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections import defaultdict
from contextlib import nullcontext

import torch
from torch.profiler import ProfilerActivity, profile

from llama_fast.build import build
from llama_fast.compilers import compiled
from llama_fast.compilers.tuner_clock import steady_tuning
from llama_fast.contracts import Encoding
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.sampling import BatchSampler, Sampling
from llama_fast.ladder.bandwidth import read_bandwidth_gb_per_s
from llama_fast.recipes import optimised
from llama_ref.checkpoint import Checkpoint, random_checkpoint
from llama_ref.models import open_model

LAYERS = 4
CUDA = torch.device("cuda")
OWN_CLOCK = "inductor's own clock"
VARIANTS: dict[str, compiled.Options] = {
    "as shipped": {},
    OWN_CLOCK: {},
    "guards of the request": {"guard_filter_fn": compiled.about_the_request},
}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    torch._inductor.config.force_disable_caches = True
    config = dataclasses.replace(open_model("random:llama-2-7b", CUDA, torch.bfloat16).config, n_layers=LAYERS)
    checkpoint = random_checkpoint(config, 0, CUDA, torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}, read {read_bandwidth_gb_per_s(CUDA):.0f} GB/s, {LAYERS} layers")
    shipped = dict(compiled.GPU_OPTIONS)
    seen: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, options in VARIANTS.items():
            for encoding in (Dense(), Int8()):
                torch._dynamo.reset()
                compiled.GPU_OPTIONS = {**shipped, **options}
                compiled.steady_tuning = nullcontext if name == OWN_CLOCK else steady_tuning  # type: ignore[attr-defined]
                seen[f"{encoding.name}, {name}"].append(measure(checkpoint, encoding, name))
    for what, times in seen.items():
        print(f"{what}: {', '.join(f'{us:.0f}' for us in times)} us")


def measure(checkpoint: Checkpoint, encoding: Encoding, name: str) -> float:
    """Compile a decode step, time rounds of it, and list its longest kernels. The step's median in us."""
    began = time.perf_counter()
    runner = build(checkpoint, optimised(encoding, compile=True), CUDA)
    cache, choose = runner.allocate(1, 256), BatchSampler(Sampling(), [0], CUDA)
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
    print(
        f"{encoding.name}, {name}: {statistics.median(times):.0f} us {spread}, compiled in {compile_seconds:.0f} s",
        flush=True,
    )
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        steps(5)
    for event in sorted(seen.key_averages(), key=lambda event: -event.device_time_total)[:9]:
        print(f"  {event.device_time_total / 5:8.1f} us in {event.count // 5:3d}  {event.key[:48]} {event.key[-8:]}")
    return statistics.median(times)


if __name__ == "__main__":
    main()

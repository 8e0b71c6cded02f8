"""The host memory that one rank's build needs, beside its shard and the largest tensor of the model.

    python tests/instruments/shard_memory.py [--model smollm2-135m] [--ranks 3] [--stages 1] [--stage 0]

Private memory (RssAnon of Linux, which a mapped file's pages are not part of) is read every two milliseconds while the shard
is built. Exit 1 if for some encoding the peak lies above shard + largest tensor, in the type that is computed with.
"""

from __future__ import annotations

import argparse
import math
import sys
import threading
from pathlib import Path

import torch

from llama_fast.build import build
from llama_fast.contracts import Shard
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.model.roofline import stored_bytes
from llama_fast.parallel.alone import Whole
from llama_fast.parallel.ranks import check_stages
from llama_fast.parallel.stages import Stages
from llama_fast.parallel.tensor_parallel import TensorParallel
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint, random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.models import resolve

MB = 1e6
TINY = LlamaConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, ffn_dim=16, vocab_size=32, max_context=16)


def private() -> int:
    """Bytes of this process that are its own."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def peak_of(checkpoint: Checkpoint, plan: Plan) -> tuple[int, int]:
    """(private bytes at the highest, above those before; the shard's bytes)."""
    build(random_checkpoint(TINY, 1), Plan(plan.encoding), "cpu")  # what the first use of anything costs
    before, peak, done = private(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        runner = build(checkpoint, plan, "cpu")
    finally:
        done.set()
        watcher.join()
    return max(peak, private()) - before, int(stored_bytes(runner.model))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--stage", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    check_stages(options.ranks, options.stages)
    size, met = options.ranks // options.stages, True
    within = TensorParallel(size // 2, size) if size > 1 else Whole()
    shard: Shard = within if options.stages == 1 else Stages(options.stage, options.stages, within)
    for encoding in (Int8(), Dense()):  # the smaller first: what it leaves in the heap would hide a peak
        checkpoint = resolve(options.model).open("cpu", torch.float32)
        largest = max(4 * math.prod(tensor.shape) for tensor in checkpoint.weights.values())
        peak, held = peak_of(checkpoint, Plan(encoding, shard=shard))
        met &= peak <= held + largest
        print(
            f"{encoding.name}, {shard}: peak {peak / MB:.0f} MB for a shard of {held / MB:.0f} MB; "
            f"shard + largest tensor {(held + largest) / MB:.0f} MB ({'MET' if peak <= held + largest else 'NOT MET'})"
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

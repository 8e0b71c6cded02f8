"""Tokens/s of a model in pipeline stages against the number of texts at once, beside what the formula says.

    torchrun --nproc-per-node 4 tests/instruments/stages.py [--model random:llama-2-70b] [--stages 2] [--rows 1,16]

Every row has a prompt of 6 tokens and gets 64 new ones (200 where it is alone), greedily. Printed by the first rank: new tokens
of all rows over the time of decode, median, least and most of 5 generations after the first, which compiles and records. The
formula is that of `llama_fast.ladder.scaling` (an H200's numbers), for shapes that have a name there. `--stages 1`: all ranks are
tensor-parallel.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from llama_fast.build import build
from llama_fast.devices import default_dtype
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner
from llama_fast.ladder.scaling import H200_FUSED, SHAPES, Layout
from llama_fast.parallel import ranks
from llama_fast.recipes import encoding_named, fused, optimised
from llama_ref.models import resolve

SLOTS = 256


def rates(runner: Runner, rows: int) -> list[float]:
    prompts = [[(7 * row + i) % 1000 % runner.config.vocab_size for i in range(6)] for row in range(rows)]
    new = 200 if rows == 1 else 64
    cache = runner.allocate(rows, min(SLOTS, runner.config.max_context))
    new = min(new, runner.config.max_context - 8)
    done = [generate(runner, prompts, new, cache=cache) for _ in range(6)]
    return sorted(one.decode_tokens_per_second for one in done[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-2-70b")
    parser.add_argument("--encoding", default="dense")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rows", default="1,16")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    member = ranks.join(options.device, stages=options.stages)
    device, encoding = member.device, encoding_named(options.encoding)
    kind = default_dtype(device)
    plan = replace(fused(encoding) if device.type == "cuda" else optimised(encoding), shard=member.shard)
    checkpoint = resolve(options.model).open(device, kind)
    runner = build(checkpoint, plan, device, kind)
    named = next((config for config in SHAPES.values() if config.n_layers == checkpoint.config.n_layers), None)
    layout = Layout(1, options.stages, member.size // options.stages)
    for rows in map(int, options.rows.split(",")):
        found = rates(runner, rows)
        word, said = {"dense": "bf16"}.get(encoding.name, encoding.name), ""
        if named is not None and device.type == "cuda" and word in ("bf16", "int8"):
            wanted = layout.tokens_per_second(H200_FUSED, named, word, rows)
            said = f", formula {wanted:.1f}: {statistics.median(found) / wanted:.0%} of it"
        if ranks.is_first():
            rate = f"{statistics.median(found):.1f} tokens/s ({found[0]:.1f} to {found[-1]:.1f})"
            print(f"{options.model}, {plan}, {rows} rows: {rate}{said}", flush=True)
    member.leave()


if __name__ == "__main__":
    main()

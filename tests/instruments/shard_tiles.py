"""The fastest tiles of a shard's matrices in a whole token, found by the ranks that will use them, and where a token's time goes.

    export PYTHONPATH=.
    python -m torch.distributed.run --standalone --nproc-per-node 4 tests/instruments/shard_tiles.py --out FILE
    python tests/instruments/shard_tiles.py --out FILE --models random:llama-2-70b --layers 8 --encodings int8      one GPU
    ... --parts 4       the shapes of four ranks, on fewer GPUs: sums are those of the ranks that are there

One matrix after another, every tile that may be worth it is timed in the whole step, the exchange with the other ranks
included, then the best few again in turns. What all ranks wait for counts: the slowest rank's median. FILE holds rows for
`llama_fast/kernels/tuning.py`, and the microseconds of every kernel with them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from llama_fast.arithmetic.triton import matrix_of
from llama_fast.build import build
from llama_fast.compilers.graphed import first_block_of
from llama_fast.contracts import KVCache
from llama_fast.kernels import ops, tuning
from llama_fast.kernels.candidates import of_one_row
from llama_fast.kernels.launching import compiled_together
from llama_fast.kernels.stored import storage_of
from llama_fast.kernels.tuning import Storage, Tile
from llama_fast.model.llama import Llama
from llama_fast.parallel.alone import Whole
from llama_fast.parallel.ranks import tensor_parallel
from llama_fast.parallel.tensor_parallel import OverNvlink, TensorParallel
from llama_fast.recipes import encoding_named, fused
from llama_ref.models import resolve
from oracle.questions.checkpoints import first_blocks

SLOTS, POSITION = 256, 106
BEGAN = time.perf_counter()
Key = tuple[str, str, int, int, Storage]


def say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"{time.perf_counter() - BEGAN:6.1f} s  {text}", flush=True)


def card() -> str:
    """The name by which the table has this GPU."""
    found = tuning.card(torch.cuda.get_device_name())
    if found is None:
        raise SystemExit(f"the table's rows are for {' or '.join(tuning.CARDS)}")
    return found


def matrices(model: Llama) -> dict[str, Key]:
    """Table keys of a model's matrices: (GPU, epilogue, rows, columns, bytes per weight)."""
    block: Any = model.blocks[0]
    all_reduce: Any = block.operations.all_reduce
    total = "add" if all_reduce.alone else "plain" if all_reduce.exchange.apart else "send"
    modules = {
        "out": (total, block.wo),
        "down": (total, block.w2),
        "qkv": ("rope", block.qkv),
        "gated": ("gated", block.gate_up),
        "head": ("plain", model.head),
    }
    weights = {name: (kind, matrix_of(module)[0]) for name, (kind, module) in modules.items()}
    return {name: (card(), kind, *w.shape, storage_of(w)) for name, (kind, w) in weights.items()}


@contextlib.contextmanager
def tile_for(key: Key, tile: Tile) -> Iterator[None]:
    before = tuning.ONE_ROW.get(key)
    tuning.ONE_ROW[key] = tile
    try:
        yield
    finally:
        if before is None:
            del tuning.ONE_ROW[key]
        else:
            tuning.ONE_ROW[key] = before


class AsIfMore(OverNvlink):
    """The ranks that are there in place of more: logits that others would send are zeros."""

    def gather(self, part: torch.Tensor, first: int, columns: int) -> torch.Tensor:
        return F.pad(part, (first, columns - first - part.shape[-1]))


def as_if_more(shard: Any, parts: int, device: torch.device, apart: bool) -> TensorParallel:
    """A shard of `parts`, on the ranks that there are."""
    from llama_fast.kernels.exchange import BLOCK, WORDS, Exchange, over_nvlink
    from llama_fast.kernels.packets import Mailbox

    if not isinstance(shard, Whole):
        return TensorParallel(shard.rank, parts, AsIfMore(over_nvlink(shard.rank, shard.size, device, apart)))
    memory = torch.zeros(2 * WORDS, dtype=torch.int64, device=device)
    inboxes = torch.tensor([memory.data_ptr()], device=device)
    mailbox = Mailbox(0, 1, WORDS, BLOCK, inboxes, torch.zeros(WORDS // BLOCK, dtype=torch.int32, device=device))
    return TensorParallel(0, parts, AsIfMore(Exchange(mailbox, memory, apart)))


class Timer:
    """Whole steps with one tile or another."""

    def __init__(self, model: Llama, cache: KVCache, ranks: int):
        self.model, self.cache, self.ranks = model, cache, ranks
        device = model.rope_table.device
        self.tokens, self.start = torch.tensor([[5]], device=device), torch.tensor([POSITION], device=device)

    def run(self) -> Any:
        return ops.likeliest(self.model(self.tokens, self.start, self.cache)[:, -1])

    def compile(self, rank: int, pairs: list[tuple[Key, Tile]]) -> None:
        """Each rank a share of the tiles; then all find them in Triton's cache."""
        with compiled_together():
            for key, tile in pairs[rank :: self.ranks]:
                with tile_for(key, tile):
                    ops.likeliest(first_block_of(self.model)(self.tokens, self.start, self.cache)[:, -1])
        self.meet()

    def meet(self) -> None:
        torch.cuda.synchronize()
        if self.ranks > 1:
            dist.barrier()

    def graph(self) -> torch.cuda.CUDAGraph:
        self.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.run()
        return graph

    def microseconds(self, graph: torch.cuda.CUDAGraph, steps: int) -> float:
        graph.replay()
        self.meet()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3 / steps

    def slowest(self, times: list[float]) -> list[float]:
        """Each the largest of all ranks'."""
        if self.ranks == 1:
            return times
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, times)
        return [max(of_tile) for of_tile in zip(*everyone)]

    def ranked(self, key: Key, tiles: list[Tile], steps: int, again: int) -> list[tuple[float, Tile]]:
        """(us a step, tile), the fastest first; the best `again` of a first look are timed in five rounds."""
        graphs = []
        for tile in tiles:
            with tile_for(key, tile):
                graphs.append(self.graph())
        first = self.slowest([self.microseconds(graph, steps) for graph in graphs])
        best = sorted(range(len(tiles)), key=lambda i: first[i])[:again]
        rounds = [[self.microseconds(graphs[i], steps) for i in best] for _ in range(5)]
        medians = self.slowest([statistics.median(of_tile) for of_tile in zip(*rounds)])
        return sorted(zip(medians, (tiles[i] for i in best)))


def kernel_microseconds(timer: Timer, graph: torch.cuda.CUDAGraph, rank: int, steps: int = 8) -> dict[str, float]:
    """us a step that each kernel adds: from the end of the one before it to its own. Linear kernels by their place."""
    timer.meet()
    with profile(activities=[ProfilerActivity.CUDA]) if rank == 0 else contextlib.nullcontext() as seen:
        for _ in range(steps):
            graph.replay()
        timer.meet()
    if rank != 0:
        return {}
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in seen.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA and event.name().startswith("_")
    )
    added: dict[str, float] = {}
    place, before = 0, spans[0][0]
    order = ("out", "gated", "down", "qkv or head")
    for _, end, name in spans:
        if name == "_embed":
            place = 3
        if name.startswith(("_in_registers", "_narrow")):  # `_limbs_apart` counts by its own name
            name, place = order[place % 4], place + 1
        elif name.startswith("_attend"):
            place = 0
        added[name] = added.get(name, 0.0) + max(0, end - before) / 1e3 / steps
        before = max(before, end)
    return {name: round(us, 1) for name, us in added.items()}


def choose(model: str, encoding: str, shard: Any, options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    rank, ranks = (0, 1) if isinstance(shard, Whole) else (shard.rank, shard.size)
    if options.parts:
        shard = as_if_more(shard, options.parts, device, options.exchanger == "apart")
    checkpoint = resolve(model).open(device, torch.bfloat16)
    if options.layers and options.layers < checkpoint.config.n_layers:
        checkpoint = first_blocks(checkpoint, options.layers)
    plan = dataclasses.replace(fused(encoding_named(encoding)), shard=shard)
    runner = build(checkpoint, plan, device, torch.bfloat16)
    timer = Timer(runner.model, runner.allocate(1, SLOTS), ranks)
    keys = matrices(runner.model)
    chosen = {name: keys[name] for name in options.kinds.split(",")}
    tiles = {}
    for name, (_, kind, n, k, itemsize) in chosen.items():
        now = tuning.linear_tile(card(), kind, n, k, 1, itemsize)
        others = itertools.islice(of_one_row(kind, n, k, itemsize, options.parts or ranks), options.most)
        tiles[name] = list(dict.fromkeys([now, *others]))
    say(f"{model} {encoding}: built; compiling {sum(map(len, tiles.values()))}")
    timer.compile(rank, [(key, tile) for name, key in chosen.items() for tile in tiles[name]])
    found: dict[str, Any] = {
        "model": model,
        "encoding": encoding,
        "ranks": timer.ranks,
        "parts": options.parts or timer.ranks,
        "layers": checkpoint.config.n_layers,
    }
    found["before_us"] = timer.slowest([statistics.median(timer.microseconds(timer.graph(), 20) for _ in range(5))])[0]
    say(f"{model} {encoding}: {found['before_us']:.1f} us a step")
    found["tiles"] = []
    for name, key in chosen.items():
        if len(tiles[name]) == 1:
            continue
        order = timer.ranked(key, tiles[name], steps=20, again=6)
        found[name] = [
            (round(us, 1), str(tuple(tile)[:4]) + tile.convert + " apart" * tile.apart) for us, tile in order
        ]
        best = order[0][1]
        tuning.ONE_ROW[key] = best
        found["tiles"].append([list(key), list(best)])
        say(f"  {name} {key[1:]}: " + "; ".join(f"{us:.1f} {tile}" for us, tile in found[name]))
    graph = timer.graph()
    found["after_us"] = timer.slowest([statistics.median(timer.microseconds(graph, 20) for _ in range(5))])[0]
    found["kernels_us"] = kernel_microseconds(timer, graph, rank)
    say(f"{model} {encoding}: {found['after_us']:.1f} us a step; {found['kernels_us']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="random:llama-2-7b")
    parser.add_argument("--encodings", default="dense,int8")
    parser.add_argument("--kinds", default="out,down,gated,qkv,head")
    parser.add_argument("--layers", type=int, default=0, help="fewer blocks than the model has, for its shapes alone")
    parser.add_argument("--most", type=int, default=24, help="tiles of a matrix that are tried; 0: what is in use")
    parser.add_argument("--parts", type=int, default=0, help="cut the model for so many ranks, whatever there are")
    parser.add_argument(
        "--exchanger", choices=("exchange", "apart"), default="exchange", help="as in llama_fast.parallel.ranks"
    )
    options = parser.parse_args()
    several = "RANK" in os.environ
    with tensor_parallel("cuda", exchanger=options.exchanger) if several else contextlib.nullcontext(Whole()) as shard:
        results = []
        for model, encoding in itertools.product(options.models.split(","), options.encodings.split(",")):
            results.append(choose(model, encoding, shard, options))
            torch.cuda.empty_cache()
            if os.environ.get("RANK", "0") == "0":
                options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

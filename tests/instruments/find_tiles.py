"""The fastest tiles of some models' products on this GPU, found as at first use but among more: for the library's own files.

    python tests/instruments/find_tiles.py --models random:llama-2-7b,random:llama-3-8b --encodings dense,int8,int4 \
        --rows 1,2,8 --into llama_fast/kernels/tiles

A file named for the card ("H200.json") then holds them beside those that it had; committed, it is what every such card starts
with, and nothing is chosen there for these shapes any more. Shapes that the tables know already keep their tiles. Afterwards the
same models decode with general tiles and with those found, and both rates are printed. `--most` candidates a product are tried.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from llama_fast.build import build
from llama_fast.engine.generate import generate
from llama_fast.engine.runner import Runner
from llama_fast.kernels import candidates, first_use, found
from llama_fast.kernels.tuning import CARDS, card
from llama_fast.recipes import encoding_named, fused
from llama_ref.models import resolve

SLOTS, NEW = 256, 120


def rate(runner: Runner, rows: int) -> float:
    """Decoded tokens/s of all rows: the median of five generations after one that compiles."""
    prompts = [[(7 * row + i) % 1000 + 1 for i in range(6)] for row in range(rows)]
    cache = runner.allocate(rows, SLOTS)
    done = [generate(runner, prompts, NEW, cache=cache) for _ in range(6)]
    return statistics.median(one.decode_tokens_per_second for one in done[1:])


def decode(name: str, encoding: str, rows: list[int]) -> dict[int, float]:
    """By rows, in a process whose tiles are as they are now."""
    device = torch.device("cuda")
    runner = build(resolve(name).open(device, torch.bfloat16), fused(encoding_named(encoding)), device, torch.bfloat16)
    return {count: rate(runner, count) for count in rows}


def without(tiles: found.Found, work: Callable[[], dict[int, float]]) -> dict[int, float]:
    """`work` with nothing that was found."""
    kept = dict(tiles.known)
    tiles.known.clear()
    os.environ[found.SWITCH] = "0"
    try:
        return work()
    finally:
        os.environ[found.SWITCH] = "1"
        tiles.known.update(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="random:llama-2-7b,random:llama-3-8b")
    parser.add_argument("--encodings", default="dense,int8,int4")
    parser.add_argument("--rows", default="1,2,8")
    parser.add_argument("--most", type=int, default=24)
    parser.add_argument("--into", type=Path, required=True, help="a folder; the card names the file")
    asked = parser.parse_args()
    gpu = torch.cuda.get_device_name()
    name = card(gpu)
    if name is None:
        raise SystemExit(f"{gpu} is none of {', '.join(CARDS)}: add it to CARDS in kernels/tuning.py")
    file, rows = asked.into / f"{name}.json", [int(count) for count in asked.rows.split(",")]
    candidates.MOST_OF_ONE_ROW = asked.most
    candidates.MOST_OF_SEVERAL = max(6, asked.most // 2)
    first_use.BUDGET_SECONDS = first_use.COMPILING_SECONDS = 600.0
    tiles = found.found_tiles(gpu)
    tiles.file, tiles._known = None, found.read(file, name)
    for model, encoding in itertools.product(asked.models.split(","), asked.encodings.split(",")):
        work = functools.partial(decode, model, encoding, rows)
        before = without(tiles, work)
        after = work()
        file.parent.mkdir(parents=True, exist_ok=True)
        found.write(file, tiles.known, name)
        for count in rows:
            told = f"{before[count]:.1f} tokens/s with general tiles, {after[count]:.1f} with those found"
            print(f"{model} {encoding}, {count} rows: {told}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

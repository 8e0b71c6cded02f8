"""Tiles on trial, in the interpreter: each candidate's product is right, and so is a step whose tiles were chosen at first use.

Run by test_interpreted.py with TRITON_INTERPRET=1.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.compilers.eager import Eager
from llama_fast.compilers.graphed import with_blocks
from llama_fast.encodings.int8 import Int8
from llama_fast.kernels import first_use, ops
from llama_fast.kernels.candidates import candidates
from llama_fast.kernels.first_use import FirstUse, Ranks
from llama_fast.kernels.found import Found, Product, found_tiles, product_of
from llama_fast.kernels.stored import LOADERS
from llama_fast.kernels.tuning import Tile
from llama_fast.recipes import encoding_named, fused
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.model import Llama as Reference

ops.ARGMAX_STRETCH = 16
CONFIG = LlamaConfig(
    dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64, vocab_size=35, max_context=64
)
ENCODINGS = ("dense", "int8", "int4", "sparse24", "sparse24-int8", "fp8-g128")


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def each_candidate() -> int:
    """Of rows that no load covers, and of so many that the last program has fewer."""
    checked, n, k = 0, 10, 384
    for name in ENCODINGS:
        kind = encoding_named(name)
        parts = kind.encode(rand(n, k, seed=1) / math.sqrt(k), torch.bfloat16)
        weight, scale = LOADERS[kind.loader](parts)
        weight = weight.bfloat16() if name == "dense" else weight  # type: ignore[union-attr]
        dense = kind.decode(parts).double() if name != "dense" else weight.double()  # type: ignore[union-attr]
        for m in (1, 5):
            x = rand(m, k, seed=2).bfloat16()
            if not ops.takes(m, weight, x):
                continue
            for tile in candidates(product_of("plain", weight, x)):
                got = ops.linear(x, weight, scale, dtype=torch.float32, tile=tile).double()
                want = x.double() @ dense.T
                error = ((got - want).norm() / want.norm()).item()
                assert error < 1e-2, (name, m, tile, error)
                checked += 1
    return checked


def a_step() -> int:
    """Rows at unequal positions, over all epilogues; the stopwatch wants the last candidate of each product."""
    first_use.candidates = last_two  # type: ignore[assignment]  # the interpreter takes its time
    found = found_tiles("cpu")
    checkpoint = random_checkpoint(CONFIG, 1, "cpu", torch.float32)
    runner = build(checkpoint, dataclasses.replace(fused(Int8()), compiler=Eager()), "cpu")
    exact = Reference(CONFIG, runner.reference_weights(), torch.float64)
    tokens_B2 = torch.randint(CONFIG.vocab_size, (2, 2), generator=torch.Generator().manual_seed(3))
    start_B, rows_B = torch.tensor([1, 0]), torch.arange(2)
    wanted_BV = exact(tokens_B2)[rows_B, start_B]
    cache = runner.allocate(2, 12)
    runner.decode(tokens_B2[:, :1], torch.zeros(2, dtype=torch.int64), cache)
    some = with_blocks(runner.model, runner.model.blocks[1:])
    tokens_B1 = tokens_B2[rows_B, start_B][:, None]
    with torch.no_grad():
        chosen = FirstUse(found, last_wins(found), Ranks()).choose(lambda: some(tokens_B1, start_B, cache))
    assert {product.epilogue for product in chosen} == {"rope", "add", "gated", "plain"}
    assert all(tile == last_two(product)[-1] == found.of(product) for product, tile in chosen.items())
    # the pass on trial has written into the caches of other blocks: what is run now writes these slots again
    logits_BV = runner.decode(tokens_B1, start_B, cache)[:, -1]
    torch.testing.assert_close(logits_BV.double(), wanted_BV, atol=2e-5, rtol=2e-5)
    return len(chosen)


def last_two(product: Product) -> list[Tile]:
    return candidates(product)[-2:]


def last_wins(found: Found) -> Callable[[Callable[[], object]], Callable[[], float]]:
    def stopwatch(run: Callable[[], object]) -> Callable[[], float]:
        run()
        us = 100.0 - sum(last_two(product).index(tile) for product, tile in found._trying.items())
        return lambda: us

    return stopwatch


if __name__ == "__main__":
    print(f"tiles: {each_candidate() + a_step()} results agree")

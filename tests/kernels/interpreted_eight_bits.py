"""Keys and values in eight bits beneath the kernels: what is kept, what attention makes of it, and a model's steps.

Run by test_interpreted.py with TRITON_INTERPRET=1, which must be set before import.
"""

import dataclasses
import itertools

import torch
from torch import Tensor

from llama_fast.build import build, rebuild
from llama_fast.caches.eight_bits import in_steps
from llama_fast.caches.paged import Paged
from llama_fast.caches.static import Static
from llama_fast.compilers.eager import Eager
from llama_fast.engine.runner import Runner
from llama_fast.kernels import ops
from llama_fast.kernels.tuning import AttentionTile
from llama_fast.recipes import fused, optimised
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig

CONFIG = LlamaConfig(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, ffn_dim=72, vocab_size=53, max_context=64
)
TILES = (AttentionTile(16, 3, 16), AttentionTile(16, 2, 16, vector=True))


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept() -> int:
    """The integers and steps of PyTorch's path, at their places and at no other; vectors large, tiny and of zeros."""
    B, T, K, d, S = 2, 3, 2, 12, 20
    new = tuple(
        rand(B * T, K, d, seed=seed) * torch.tensor([1e4, 1.0, 1e-6, 0.0, 3.0, 7.0])[:, None, None] for seed in (1, 2)
    )
    start_B = torch.tensor([4, 17])
    for dtype in (torch.float32, torch.bfloat16):
        k, v = (each.to(dtype) for each in new)
        layer = Static(bits=8).allocate(dataclasses.replace(CONFIG, n_layers=1), B, S, dtype, k.device).layers[0]
        wanted = Static(bits=8).allocate(dataclasses.replace(CONFIG, n_layers=1), B, S, dtype, k.device).layers[0]
        wanted.put(k.view(B, T, K, d), v.view(B, T, K, d), start_B[:, None] + torch.arange(T))
        ops.keep_in_eight_bits((k, v), layer.tensors, start_B, None)
        assert all(torch.equal(*pair) for pair in zip(layer.tensors, wanted.tensors, strict=True))
    return 2


def attended() -> int:
    """Attention over integers and steps is attention over what they stand for."""
    shapes = ((2, 2, 16, 1, 1), (4, 2, 12, 2, 1), (6, 2, 12, 2, 3), (3, 1, 12, 1, 8))  # H, HKV, HD, B, T
    for (h, hkv, hd, b, t), tile in itertools.product(shapes, TILES):
        slots, q = 70, rand(b * t, h * hd, seed=1)
        whole = [rand(b, hkv, slots, hd, seed=2 + i) * rand(b, hkv, slots, 1, seed=4 + i).exp() for i in range(2)]
        (k, k_step), (v, v_step) = (in_steps(each) for each in whole)
        scratch = ops.AttentionScratch.of(b * t, h, hkv, hd, q.device, tile.splits)
        for first in (0, 33, slots - t):
            start = torch.tensor([first, (first * 7 + 3) % (slots - t + 1)][:b])
            steps = [each.clone() for each in (k_step, v_step)]
            for row in range(b):
                for each in steps:
                    each[row, :, int(start[row]) + t :] = float("nan")
            got = ops.attention(q, k, v, start, scratch, tile=tile, steps=(steps[0], steps[1]))
            want = ops.attention(q, k * k_step, v * v_step, start, scratch, tile=tile)
            torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5)
            halves = ops.attention(q.bfloat16() * 8, k, v, start, scratch, tile=tile, steps=(steps[0], steps[1]))
            wide = ops.attention(q.bfloat16().float() * 8, k, v, start, scratch, tile=tile, steps=(steps[0], steps[1]))
            assert (halves.float() - wide).norm() / wide.norm() < 0.012
    return len(shapes) * len(TILES) * 6


def stepped() -> int:
    """A model's prompts and steps, of unequal rows, in slots and in pages: PyTorch's integers, but for what lies between two."""
    checkpoint = random_checkpoint(CONFIG, 1, "cpu", torch.float32)
    plain = build(checkpoint, dataclasses.replace(optimised(), cache=Static(bits=8)), "cpu", torch.float32)
    plan = dataclasses.replace(fused(), compiler=Eager(), cache=Static(bits=8))
    ours = build(checkpoint, plan, "cpu", torch.float32)
    pages = rebuild(ours, dataclasses.replace(plan, cache=Paged(page=4, bits=8)))
    tokens_BL = torch.randint(53, (2, 20), generator=torch.Generator().manual_seed(3))
    found = [run(runner, tokens_BL) for runner in (plain, ours, pages)]
    for (logits, keys), of in zip(found[1:], ("slots", "pages"), strict=True):
        torch.testing.assert_close(logits, found[0][0], atol=0.02, rtol=0.02)
        apart = (keys - found[0][1]).abs()
        assert apart.max() < 0.06 and (apart > 1e-4).float().mean() < 0.01, of
    torch.testing.assert_close(found[1][1], found[2][1], atol=0, rtol=0)
    return len(found)


def run(runner: Runner, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of two steps behind a prompt, one of one token and one of three; and all keys and values that are there."""
    cache, lengths_B = runner.allocate(2, 24), torch.tensor([9, 5])
    runner.prefill(tokens_BL[:, :9], lengths_B, cache)
    rows_B1, seen = torch.arange(2)[:, None], []
    for T in (1, 3):
        seen.append(
            runner.decode(tokens_BL[rows_B1, lengths_B[:, None] + torch.arange(T)], lengths_B, cache).flatten(0, 1)
        )
        lengths_B = lengths_B + T
    kept = [each[row, :, : lengths_B[row]] for layer in cache.layers for each in (layer.k, layer.v) for row in range(2)]
    return torch.cat(seen), torch.cat([each.flatten() for each in kept])


def main() -> None:
    print(f"eight_bits: {kept() + attended() + stepped()} results agree")


if __name__ == "__main__":
    main()

"""The kernels against plain float64 torch, on tiny odd shapes.

Run by test_interpreted.py with TRITON_INTERPRET=1, which must be set before import.
"""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llama_fast.contracts import Encoding
from llama_fast.encodings.fp8 import Fp8
from llama_fast.encodings.int4 import Int4
from llama_fast.encodings.int8 import Int8
from llama_fast.encodings.sparse24 import Sparse24
from llama_fast.engine.sampling import BatchSampler, Sampling, draw
from llama_fast.kernels import many_rows, ops, tuning
from llama_fast.kernels.stored import LOADERS, Narrow
from llama_fast.kernels.tuning import AttentionTile, Tile

NAN = float("nan")
ops.ARGMAX_STRETCH = 32  # what the interpreter reduces it walks element by element


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weight(n: int, k: int, encoding: str, seed: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(stored weight, scale or None, what they mean in float64)."""
    dense = rand(n, k, seed=seed, dtype=torch.float64) / math.sqrt(k)
    if encoding == "int8":
        scale = (dense.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
        stored = (dense / scale.double()).round().clamp(-127, 127).to(torch.int8)
        return stored, scale, stored.double() * scale.double()
    stored = dense.to(torch.bfloat16 if encoding == "bf16" else torch.float32)
    return stored, None, stored.double()


def activations(encoding: str) -> torch.dtype:
    return torch.float32 if encoding == "float32" else torch.bfloat16


def close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """Relative error by norms: far under one rounding of the activations' type."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} != {tuple(want.shape)}"
    error = ((got.double() - want).norm() / want.norm()).item()
    limit = roundings * (
        1e-5 if dtype == torch.float32 else 1.2e-2
    )  # the interpreter truncates to bf16: twice the error
    assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.0e}"


def normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps) * gain.double()


ENCODINGS = ("float32", "bf16", "int8")
TILES = (
    Tile(4, 32, 4),
    Tile(8, 64, 4, blocks=2),
    Tile(4, 32, 4, blocks=2, vector=True),
    Tile(16, 16, 4),
    Tile(16, 32, 4, ahead=2),
    Tile(32, 64, 4, ahead=5),
    Tile(16, 128, 4, slices=4),
    Tile(16, 64, 2, slices=2, ahead=1),
    Tile(16, 32, 4, slices=0),
)


def suits(tile: Tile, m: int) -> bool:
    """Dots want 16 rows of weights, and several of activations."""
    return tile.vector or (m > 1) == (tile.rows >= 16)


def check_linear() -> int:
    n_checked = 0
    shapes = [*itertools.product(ENCODINGS, (1, 2, 5, 8), TILES, ((37, 72), (5, 20)))]
    for n in (37, tuning.MANY_ROWS):  # the tiles of small matrices, and of large ones
        shapes += [("int8", m, tuning.many_rows_tile("add", n, 72, m), (37, 72)) for m in (9, 20, 40, 100)]
    for encoding, m, tile, (n, k) in shapes:
        if not suits(tile, m):
            continue
        stored, scale, dense = weight(n, k, encoding, seed=n)
        dtype = activations(encoding)
        x, residual, gain = (
            rand(m, k, seed=1, dtype=dtype),
            rand(m, n, seed=2, dtype=dtype),
            rand(k, seed=3, dtype=dtype),
        )
        what = f"{encoding} m={m} {tile} {n}x{k}"
        close(
            f"add {what}",
            ops.linear_add(x, stored, scale, residual, tile=tile),
            residual.double() + x.double() @ dense.T,
            dtype,
        )
        logits = ops.linear(x, stored, scale, gain=gain, eps=1e-5, dtype=torch.float32, tile=tile)
        assert logits.dtype == torch.float32
        close(f"head {what}", logits, normed(x, gain, 1e-5) @ dense.T, dtype)
        pair, pair_scale, pair_dense = weight(2 * n, k, encoding, seed=n + 1)
        gate, up = (normed(x, gain, 1e-5) @ pair_dense.T).chunk(2, dim=1)
        got = ops.gated(x, gain, 1e-5, pair, pair_scale, tile=tile)
        close(f"gated {what}", got, torch.nn.functional.silu(gate) * up, dtype)
        n_checked += 3
    return n_checked


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Complex multiplication of pairs (2i, 2i + 1); x [..., HD], cos and sin [..., HD / 2]."""
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def narrow(kind: Encoding, n: int, k: int, seed: int) -> tuple[Tensor | Narrow, Tensor | None, Tensor]:
    """(stored weight, scale of rows or None, what they mean in float64) of an encoding whose columns take less than a byte."""
    parts = kind.encode(rand(n, k, seed=seed) / math.sqrt(k), torch.bfloat16)
    return *LOADERS[kind.loader](parts), kind.decode(parts).double()


NARROW = (Int4(), Int4(32), Int4(32, True), Int4(128, True), Sparse24(), Sparse24(True), Fp8(128), Fp8(32))
NARROW_TILES = (Tile(4, 256, 4), Tile(2, 128, 2, blocks=2), Tile(8, 512, 4, blocks=3, apart=True))


def check_scales() -> None:
    """Scales that are read two at a time, of an even number of groups, or one by one, of an odd one; a slice is of one group, of
    several, or of a part of one. The products are exact, so that what is left is the rounding of sums."""
    kinds = Int4(128), Int4(128, True), Int4(64, True), Int4(32), Int4(32, True), Fp8(128), Fp8(32)
    ways = (512, 1, 128, torch.bfloat16), (384, 2, 64, torch.float16), (512, 2, 128, torch.float16)
    for kind, (k, loads, each, scales) in itertools.product(kinds, ways):
        parts = kind.encode(rand(20, k, seed=8), torch.bfloat16)
        parts["scale"] = (parts["scale"] * 1.003).to(scales)
        stored, scale = LOADERS[kind.loader](parts)
        x, gain = rand(5, k, seed=7, dtype=torch.bfloat16), rand(k, seed=6, dtype=torch.bfloat16)
        x[1] *= 1e6  # beyond fp16
        tile = Tile(16, 2 * each, 2, slices=2, loads=loads, ahead=1)
        got = ops.linear(x, stored, scale, dtype=torch.float32, tile=tile).double()
        want = x.double() @ kind.decode(parts).double().T
        error = ((got - want).norm(dim=1) / want.norm(dim=1)).max()
        assert error < 2**-20, f"{kind.name} {k} {loads} {each} {scales}: {error:.2e}"
        got = ops.linear(x, stored, scale, gain=gain, eps=1e-5, dtype=torch.float32, tile=tile)
        close(f"normed {kind.name}", got, normed(x, gain, 1e-5) @ kind.decode(parts).double().T, torch.bfloat16)


def check_narrow() -> int:
    """Weights of less than a byte a column, by every epilogue; unlike bf16's, the error is that of the result's type alone."""
    n_checked, k = 0, 384
    cases = [(1, tile, n) for tile, n in zip(NARROW_TILES, (37, 10, 26))]
    shapes = [*itertools.product(NARROW, cases)]
    for kind in (Int4(32), Int4(64), Int4(128, True), Sparse24(), Sparse24(True), Fp8(128)):
        each = 64  # of a row's columns; the last slices and loads find none
        shapes += [
            (kind, (2, Tile(16, 2 * each, 2, slices=2), 37)),
            (kind, (3, Tile(16, 4 * each, 4, slices=4, loads=2, ahead=1), 10)),
            (kind, (9, Tile(32, each, 4, slices=0, ahead=2), 26)),
            (kind, (4, Tile(16, 2 * each, 2, slices=2, splits=3), 37)),
        ]
    shapes += [(Int4(128, False), (5, Tile(16, 256, 2, slices=2, loads=2, stages=1), 10))]
    shapes += [(kind, (20, Tile(32, 128, 4, slices=0, loads=2, splits=2), 26)) for kind in (Int4(), Int4(32))]
    vector = Tile(4, 256, 2, blocks=2, apart=True, vector=True)
    shapes += [(kind, (2, vector, 10)) for kind in (Int4(), Int4(32, True))]
    for kind, (m, tile, n) in shapes:
        x, residual, gain = rand(m, k, seed=1), rand(m, n, seed=2), rand(k, seed=3)
        x[:, 5] *= 100  # one activation of many times the others' size
        what = f"{kind.name} m={m} {tile} {n}x{k}"
        stored, scale, dense = narrow(kind, n, k, seed=n)
        got = ops.linear_add(x, stored, scale, residual, tile=tile)
        bits = (
            3 if kind.name == "sparse24-int8" or m > 1 else 1
        )  # activations of 20 bits, not 22; sums in another order
        close(f"add {what}", got, residual.double() + x.double() @ dense.T, torch.float32, bits)
        logits = ops.linear(x, stored, scale, gain=gain, eps=1e-5, dtype=torch.float32, tile=tile)
        close(f"head {what}", logits, normed(x, gain, 1e-5) @ dense.T, torch.float32, bits)
        pair, pair_scale, pair_dense = narrow(kind, 2 * n, k, seed=n + 1)
        gate, up = (normed(x, gain, 1e-5) @ pair_dense.T).chunk(2, dim=1)
        got = ops.gated(x, gain, 1e-5, pair, pair_scale, tile=tile)
        close(f"gated {what}", got, torch.nn.functional.silu(gate) * up, torch.float32, bits)
        n_checked += 3
    many_rows.WIDENED_NUMBERS = 20 * k  # slices of 20 rows
    for kind, dtype in itertools.product((*NARROW, Int8(), Fp8()), (torch.float32, torch.bfloat16)):
        x, residual, gain = (
            rand(5, k, seed=1, dtype=dtype),
            rand(5, 37, seed=2, dtype=dtype),
            rand(k, seed=3, dtype=dtype),
        )
        x[1] *= 1e4  # beyond fp16
        stored, scale, dense = narrow(kind, 37, k, seed=4)
        what = f"{kind.name} {dtype} wide"
        added = many_rows.add_wide(residual.clone(), many_rows.wide_linear(x, stored, scale))
        close(f"add {what}", added[::2], (residual.double() + x.double() @ dense.T)[::2], dtype)
        close(f"add {what}, large", added[1:2], (residual.double() + x.double() @ dense.T)[1:2], dtype)
        logits = many_rows.wide_linear(x, stored, scale, gain, 1e-5).value(torch.float32)
        close(f"head {what}", logits, normed(x, gain, 1e-5) @ dense.T, dtype)
        pair, pair_scale, pair_dense = narrow(kind, 2 * 26, k, seed=5)
        gate, up = (normed(x, gain, 1e-5) @ pair_dense.T).chunk(2, dim=1)
        got = many_rows.gate(many_rows.wide_linear(x, pair, pair_scale, gain, 1e-5), dtype)
        close(f"gated {what}", got, torch.nn.functional.silu(gate) * up, dtype, roundings=2)  # products are stored too
        n_checked += 4
    assert not any(ops.arrivals(blocks, x.device).any() for blocks in (1, 2, 4)), "counters must be left at zero"
    check_scales()
    stored, scale, _ = narrow(Int4(96), 10, 96, seed=1)
    assert "3 rows of int4 weights in groups of 96 are widened" in ops.widened_at_every_step(3, stored)
    stored, scale, _ = narrow(Int4(32), 10, 64, seed=1)
    assert not ops.widened_at_every_step(200, stored), "so many rows are multiplied as fast as they can be"
    assert not ops.widened_at_every_step(3, x), "a matrix of whole numbers is read as it is"
    x = rand(1, 64, seed=2)
    x[0, 3] = NAN
    for tile, gain in itertools.product((Tile(4, 64, 2), Tile(4, 64, 2, apart=True)), (None, x[0] * 0 + 1)):
        got = ops.linear(x, stored, scale, gain=gain, eps=1e-5, tile=tile)
        assert got.isnan().all(), "a broken model must not look well"
    return n_checked


def in_pages(cache: Tensor, page: int, seed: int) -> tuple[Tensor, ops.Table]:
    """A cache [B, HKV, S, HD] as pages of a pool [N, HKV, HD] in any order, NaN where no row's page is; and their table."""
    b, hkv, slots, hd = cache.shape
    row_pages = -(-slots // page)
    order = torch.randperm(b * row_pages + 2, generator=torch.Generator().manual_seed(seed))[: b * row_pages].view(
        b, -1
    )
    pool = torch.full(((b * row_pages + 2) * page, hkv, hd), NAN, dtype=cache.dtype)
    at = slots_in(order, torch.arange(slots).expand(b, -1), page)
    pool[at] = cache.transpose(1, 2)
    return pool, ops.Table(order, page)


def slots_in(pages: Tensor, position: Tensor, page: int) -> Tensor:
    return torch.stack([row[of // page] * page + of % page for row, of in zip(pages, position)])


def check_qkv() -> int:
    n_checked = 0
    shapes = ((2, 1, 8, 1, 1), (4, 2, 10, 1, 1), (6, 2, 16, 2, 3), (3, 3, 4, 2, 1), (2, 1, 8, 2, 4))  # H, HKV, HD, B, T
    for encoding, (h, hkv, hd, b, t), tile in itertools.product(ENCODINGS, shapes, TILES):
        if not suits(tile, b * t):
            continue
        slots, dim, m = 7, 40, b * t
        dtype = activations(encoding)
        angles = rand(slots, hd // 2, seed=9, dtype=torch.float64)
        cos, sin = angles.cos(), angles.sin()
        stored, scale, dense = weight((h + 2 * hkv) * hd, dim, encoding, seed=4)
        x, gain = rand(m, dim, seed=5, dtype=dtype), rand(dim, seed=6, dtype=dtype)
        for first in (0, 1, slots - t) if encoding == "float32" else (0, slots - t):
            start = torch.tensor([first, (first * 2 + 1) % (slots - t + 1)][:b])
            caches = [torch.full((b, hkv, slots, hd), NAN, dtype=dtype) for _ in range(2)]
            rope = ops.Rope(cos.float(), sin.float(), start, caches[0], caches[1], h)
            q = ops.qkv(x, gain, 1e-5, stored, scale, rope, tile=tile)
            flat = (normed(x, gain, 1e-5) @ dense.T).view(b, t, h + 2 * hkv, hd)
            at = start[:, None] + torch.arange(t)
            turned = rotated(flat[:, :, : h + hkv], cos[at][:, :, None], sin[at][:, :, None])
            what = f"{encoding} {(h, hkv, hd, b, t)} {tile} start={start.tolist()}"
            close(f"q {what}", q.view(b, t, h, hd), turned[:, :, :h], dtype)
            for name, cache, want in (("k", caches[0], turned[:, :, h:]), ("v", caches[1], flat[:, :, h + hkv :])):
                for row in range(b):
                    close(f"{name} {what}", cache[row][:, at[row]], want[row].transpose(0, 1), dtype)
                assert cache.isnan().sum() == b * hkv * (slots - t) * hd, f"{name} {what}: wrote other slots"
            n_checked += 3
            (k_pool, table), (v_pool, _) = (in_pages(torch.full_like(cache, NAN), 2, seed=8) for cache in caches)
            places = slots_in(table.pages, at, 2)
            in_pool = rope._replace(k_cache=k_pool, v_cache=v_pool, at=places.flatten())
            assert torch.equal(ops.qkv(x, gain, 1e-5, stored, scale, in_pool, tile=tile), q), f"q {what} in pages"
            for name, pool, cache in (("k", k_pool, caches[0]), ("v", v_pool, caches[1])):
                for row in range(b):
                    assert torch.equal(pool[places[row]], cache[row][:, at[row]].transpose(0, 1)), (
                        f"{name} {what} in pages"
                    )
                assert pool.isnan().sum() == pool.numel() - m * hkv * hd, (
                    f"{name} {what}: wrote other slots of the pool"
                )
            n_checked += 2
    return n_checked


def check_attention() -> int:
    n_checked = 0
    shapes = (
        (2, 2, 16, 1, 1),
        (4, 2, 8, 2, 1),
        (6, 2, 20, 2, 3),
        (3, 1, 12, 1, 8),
        (2, 2, 16, 2, 4),
        (3, 3, 12, 2, 2),
    )  # H, HKV, HD, B, T
    tiles = (AttentionTile(16, 3, 16), *(AttentionTile(16, splits, 16, vector=True) for splits in (1, 4)))
    for dtype, (h, hkv, hd, b, t), (i, tile) in itertools.product(
        (torch.float32, torch.bfloat16), shapes, enumerate(tiles)
    ):
        slots = 70
        firsts: Sequence[int] = (0, 16, 33, slots - t)
        if dtype == torch.float32:
            everywhere = (h, hkv, b, t) == (4, 2, 2, 1)  # by one tile or another, and two rows
            firsts = range(i, slots - t + 1, len(tiles)) if everywhere else (0, 1, 15, 16, 33, slots - t)
        scratch = ops.AttentionScratch.of(b * t, h, hkv, hd, torch.device("cpu"), tile.splits)
        for tensor in scratch[:2]:
            tensor.fill_(NAN)
        q = rand(b * t, h * hd, seed=1, dtype=dtype)
        whole_k, whole_v = rand(b, hkv, slots, hd, seed=2, dtype=dtype), rand(b, hkv, slots, hd, seed=3, dtype=dtype)
        for first in firsts:
            start = torch.tensor([first, (first * 7 + 3) % (slots - t + 1)][:b], dtype=torch.int32)
            k, v = whole_k.clone(), whole_v.clone()
            want = torch.empty(b, t, h, hd, dtype=torch.float64)
            for row in range(b):
                end = int(start[row]) + t
                k[row, :, end:], v[row, :, end:] = NAN, NAN
                keys, values = (c[row, :, :end].double().repeat_interleave(h // hkv, 0) for c in (k, v))
                for j in range(t):
                    n = int(start[row]) + j + 1
                    scores = torch.einsum("hd,hnd->hn", q.view(b, t, h, hd)[row, j].double(), keys[:, :n]) / math.sqrt(
                        hd
                    )
                    want[row, j] = torch.einsum("hn,hnd->hd", scores.softmax(1), values[:, :n])
            got = ops.attention(q, k, v, start, scratch, tile=tile)
            close(
                f"attention {dtype} {(h, hkv, hd, b, t)} {tile} start={start.tolist()}",
                got.view(b, t, h, hd),
                want,
                dtype,
            )
            assert not scratch.arrived.any(), "counters must be left at zero"
            n_checked += 1
            if first in tuple(firsts)[:: len(firsts) // 2]:
                page = 4 if first % 2 else 32
                (k_pool, table), (v_pool, _) = in_pages(k, page, seed=first), in_pages(v, page, seed=first)
                paged = ops.attention(q, k_pool, v_pool, start, scratch, tile=tile, table=table)
                assert torch.equal(paged, got), (
                    f"attention of pages of {page} {(h, hkv, hd, b, t)} {tile} {start.tolist()}"
                )
                n_checked += 1
    return n_checked


def check_ends() -> int:
    table = rand(11, 1030, seed=1, dtype=torch.bfloat16)
    tokens = torch.tensor([3, 0, 10])
    assert torch.equal(ops.embed(tokens, table), table[tokens])
    for rows, vocab in ((1, 7), (3, 79), (2, 64)):
        logits = rand(rows, vocab, seed=2)
        logits[0, 5], logits[0, vocab - 1], logits[rows - 1, 2] = 9.0, 9.0, 11.0
        scratch = ops.ArgmaxScratch.of(rows, vocab, torch.device("cpu"))
        for _ in range(2):
            assert torch.equal(ops.argmax(logits, scratch), logits.argmax(1)), (rows, vocab)
        assert ops.argmax(torch.zeros(rows, vocab), scratch).tolist() == [0] * rows
    return 10


def check_choosing() -> int:
    """Laws and draws against `sampling`: the same tokens are kept, ties among them, and the same ones drawn."""
    n_checked = 0
    for vocab, top_k, min_p in itertools.product((5, 35, 300), (None, 1, 4, 34, 999), (0.0, 0.1)):
        logits = rand(4, vocab, seed=vocab)
        logits[1] = (logits[1] * 2).round() / 2  # many ties, zeros of both signs
        logits[2, ::2] = -torch.inf
        sampling = Sampling(0.7, top_k=top_k, min_p=min_p)
        choose = BatchSampler(sampling, [0] * 4, torch.device("cpu"))
        want = choose.probabilities(logits)
        got = ops.distribution(
            logits, choose.temperature_B, choose.top_k_B if top_k else None, choose.min_p_B if min_p else None
        )
        assert torch.equal(got > 0, want > 0), f"law {vocab} {sampling}: other tokens are kept"
        assert (got - want).abs().max() <= 1e-6, f"law {vocab} {sampling}: {(got - want).abs().max():.1e}"
        n_checked += 1
        for u in (0.0, 0.3, 1 - 2**-53):
            uniform = torch.tensor([u, 1 - u if u else 0.25, u, u], dtype=torch.float64)
            tokens = ops.draw(want, uniform)
            assert torch.equal(tokens, draw(want, uniform)), f"draw {vocab} {sampling} {u}: {tokens}"
            assert (want.gather(1, tokens[:, None]) > 0).all()
            n_checked += 1
    signed = torch.tensor(
        [[3.0, 2.0, 1.0, -0.0, -0.0, -1.0, -2.0, -5.0], [0.0, 0.0, 0.0, -0.0, -1.0, -1.0, -2.0, -3.0]]
    )
    one, three = torch.ones(1), torch.tensor([3])
    assert ((ops.distribution(signed, one, three) > 0).sum(1) == torch.tensor([3, 4])).all(), (
        "zeros of both signs are equal"
    )
    broken = torch.tensor([[3.0, 2.0, NAN, 0.5, 0.1]])
    assert ops.distribution(broken, one, three).isnan().all(), "a broken model must not look well"
    assert ops.distribution(broken, one * 0, three).isnan().any(), "nor at temperature 0"
    n_checked += check_rows_of_their_own() + check_edited_rows()
    tail = torch.full((60, 300), 1e-8)  # of which float32 sums beside 1 would lose every one
    tail[:, 0] = 1.0
    at = torch.arange(1, 300, 5).double()
    assert torch.equal(ops.draw(tail, (1 + (at - 0.5) * float(tail[0, 1])) / tail[0].double().sum()), at.long())
    coins = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    law = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).expand(200, -1)
    assert torch.equal(ops.draw(law, coins), draw(law, coins))
    quarter = torch.tensor([[0.25, 0.25, 0.5]] * 3)
    assert ops.draw(quarter, torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)).tolist() == [0, 1, 2]
    short = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1e-30]])
    assert ops.draw(short, torch.tensor([0.0, 0.7], dtype=torch.float64)).tolist() == [1, 2]
    laws = torch.rand(100, 290, generator=torch.Generator().manual_seed(2)).pow(8)
    laws[:, 100:128], laws[:, 250:] = 0.0, 0.0  # the ends of stretches
    stretch = laws[:, :128].double().sum(1) / laws.double().sum(1)
    for uniform in (torch.full((100,), 1 - 2**-53, dtype=torch.float64), stretch * (1 - 2**-53), stretch.clone()):
        tokens = ops.draw(laws, uniform)  # where the last digit of a sum decides
        assert (laws.gather(1, tokens[:, None]) > 0).all()
    assert torch.equal(ops.draw(laws, coins[:100]), draw(laws, coins[:100])), "a law need not sum to 1"
    return n_checked + 7


def check_rows_of_their_own() -> int:
    """Rows with other settings side by side, one set of logits each and two: each as it is alone."""
    settings = [
        Sampling(0.0, seed=1),
        Sampling(0.7, top_k=3, seed=2),
        Sampling(1.3, min_p=0.2, seed=3),
        Sampling(0.9, top_k=35, seed=4),
        Sampling(2.0, top_k=4, min_p=0.1, seed=5),
    ]
    choose = BatchSampler.of_free_rows(5, torch.device("cpu"), 35)
    choose.set_rows(0, settings)
    numbers = choose.temperature_B, choose.top_k_B, choose.min_p_B
    for each in (1, 2):
        logits = rand(5 * each, 35, seed=each)
        logits[0, 4] = logits[0, 9] = 9.0  # a tie of the row that takes the largest
        law = ops.distribution(logits, *numbers)
        assert law[0].tolist() == [float(v == 4) for v in range(35)]
        want = choose.probabilities(logits.view(5, each, 35)).view(5 * each, 35)
        assert torch.equal(law > 0, want > 0) and (law - want).abs().max() <= 1e-6
        for b, number in enumerate(zip(*numbers, strict=True)):
            if b:
                part = slice(b * each, b * each + each)
                alone = ops.distribution(logits[part], *(value[None] for value in number))
                assert torch.equal(law[part], alone), b
    return 2


class Allowing:
    """A grammar that is only looked at."""

    ends = ()

    def begin(self) -> Any:
        raise AssertionError("a sampler begins no row")


def check_edited_rows() -> int:
    """Rows with biases, penalties and masks, down to a single token: kernels choose from edited logits as PyTorch does."""
    edits: dict[str, Any] = {"frequency_penalty": 0.7, "presence_penalty": 0.4, "logit_bias": {3: 2.5, 30: -100.0}}
    words = torch.tensor([[-1, -1], [0b1010, 0], [0, 1], [-1, -1], [1 << 4, 0]], dtype=torch.int32)
    for cold in (False, True):
        settings = [
            Sampling(0.0 if cold else 0.9, seed=1, **edits),
            Sampling(0.0 if cold else 1.1, top_k=20, seed=2, grammar=Allowing()),
            Sampling(0.0 if cold else 1.3, seed=3, grammar=Allowing(), **edits),
            Sampling(0.0 if cold else 0.7, min_p=0.1, seed=4),
            Sampling(0.0 if cold else 1.0, top_k=3, min_p=0.2, seed=5, grammar=Allowing()),
        ]
        plain, kernels = (BatchSampler.of_free_rows(5, torch.device("cpu"), 35) for _ in range(2))
        kernels.kernels = ops
        for choose in (plain, kernels):
            choose.allowed = lambda first, count: words[first : first + count]
            choose.set_rows(0, settings, [[1], [2], [3], [4], [5]])
        for step in range(6):
            logits, at = rand(5, 35, seed=step), torch.full((5,), step)
            tokens = plain(logits, at)
            assert torch.equal(kernels(logits, at), tokens), f"step {step}: {tokens}"
            assert int(tokens[1]) in (1, 3) and tokens[2] == 32 and tokens[4] == 4
            plain.note(tokens)
            kernels.note(tokens)
    return 12


CHECKS: dict[str, Callable[[], int]] = {
    "linear": check_linear,
    "narrow": check_narrow,
    "qkv": check_qkv,
    "attention": check_attention,
    "ends": check_ends,
    "choosing": check_choosing,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        print(f"{name}: {CHECKS[name]()} results agree")

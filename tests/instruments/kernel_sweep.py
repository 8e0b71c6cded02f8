"""How fast a whole decode token goes with the kernels alone: random weights of a Llama shape, one CUDA graph per step.

    python tests/instruments/kernel_sweep.py --out DIR [--stages tiles,descend,tokens,long,rows] [--budget SECONDS]

Stages: `tiles` sweeps block sizes matrix by matrix; `descend` changes one tile at a time in the whole token; `tokens` times whole
tokens; `long` does so at 4096 tokens of context; `rows` chooses tiles for 2, 5 and 8 rows in the same way.
Every time is a median over interleaved rounds, beside the read bandwidth measured in the same process; every whole step is
checked against a float32 torch step on the same weights.
"""

import argparse
import concurrent.futures
import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels import ops
from llama_fast.kernels.tuning import AttentionTile, Tile

EPS = 1e-5
BEGAN = time.perf_counter()


class Shape(NamedTuple):
    """A Llama's dimensions."""

    name: str
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool

    def matrices(self) -> dict[str, tuple[int, int, str]]:
        """name -> (rows, columns, epilogue)."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.dim, "rope"),
            "out": (self.dim, self.heads * self.head_dim, "add"),
            "gated": (2 * self.ffn, self.dim, "gated"),
            "down": (self.dim, self.ffn, "add"),
            "head": (self.vocab, self.dim, "plain"),
        }


SHAPES = {
    "7b": Shape("7b", 4096, 32, 32, 32, 128, 11008, 32000, False),
    "1b": Shape("1b", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "8b": Shape("8b", 4096, 32, 32, 8, 128, 14336, 128256, False),
}


class Weights(NamedTuple):
    """matrices[name][layer] = (weight, scale or None); gains[layer] = (attention, feed-forward)."""

    shape: Shape
    encoding: str
    table: Tensor
    matrices: dict[str, list[tuple[Tensor, Tensor | None]]]
    gains: list[tuple[Tensor, Tensor]]
    final_gain: Tensor

    def bytes_per_token(self) -> int:
        stored = [t for pairs in self.matrices.values() for pair in pairs for t in pair if t is not None]
        return sum(t.nbytes for t in stored)


def random_matrix(n: int, k: int, encoding: str) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / math.sqrt(k)
    if encoding == "bf16":
        return weight, None
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    return (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def random_weights(shape: Shape, encoding: str) -> Weights:
    matrices = {
        name: [random_matrix(n, k, encoding) for _ in range(1 if name == "head" else shape.layers)]
        for name, (n, k, _) in shape.matrices().items()
    }
    gain = lambda: (1 + 0.1 * torch.randn(shape.dim, device="cuda")).bfloat16()  # noqa: E731
    table = torch.randn(shape.vocab, shape.dim, device="cuda", dtype=torch.bfloat16)
    return Weights(shape, encoding, table, matrices, [(gain(), gain()) for _ in range(shape.layers)], gain())


class State(NamedTuple):
    """What a step reads and writes beside the weights."""

    tokens: Tensor
    start: Tensor
    k: list[Tensor]
    v: list[Tensor]
    cos: Tensor
    sin: Tensor
    attention_scratch: ops.AttentionScratch
    argmax_scratch: ops.ArgmaxScratch


def new_state(shape: Shape, rows: int, batch: int, slots: int, start: int) -> State:
    inverse = 1.0 / 10000 ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    angles = torch.arange(slots, dtype=torch.float64)[:, None] * inverse
    cache = lambda: torch.randn(batch, shape.kv_heads, slots, shape.head_dim, device="cuda").bfloat16()  # noqa: E731
    device = torch.device("cuda")
    return State(
        torch.arange(5, 5 + rows, device="cuda"),
        torch.full((batch,), start, device="cuda"),
        [cache() for _ in range(shape.layers)],
        [cache() for _ in range(shape.layers)],
        angles.cos().float().cuda(),
        angles.sin().float().cuda(),
        ops.AttentionScratch.of(rows, shape.heads, shape.kv_heads, shape.head_dim, device, 64),
        ops.ArgmaxScratch.of(rows, shape.vocab, device),
    )


class Options(NamedTuple):
    """A way to run a step. early: positions read before the kernel ahead has ended."""

    tiles: dict[str, Tile] = {}
    attention: AttentionTile | None = None
    pdl: bool = True
    early: bool = True
    advance: bool = True


def step(weights: Weights, state: State, options: Options) -> Tensor:
    """One decode step of M = tokens.numel() rows; logits [M, V] float32."""
    shape, pdl, tiles = weights.shape, options.pdl, options.tiles

    x = ops.embed(state.tokens, weights.table, pdl=pdl)
    for i in range(shape.layers):
        w = {name: pairs[i] for name, pairs in weights.matrices.items() if name != "head"}
        rope = ops.Rope(state.cos, state.sin, state.start, state.k[i], state.v[i], shape.heads)
        q = ops.qkv(x, weights.gains[i][0], EPS, *w["qkv"], rope, tile=tiles.get("qkv"), pdl=pdl, early=options.early)
        a = ops.attention(q, state.k[i], state.v[i], state.start, state.attention_scratch, tile=options.attention, pdl=pdl,
                          early=options.early)  # fmt: skip
        x = ops.linear_add(a, *w["out"], x, tile=tiles.get("out"), pdl=pdl)
        h = ops.gated(x, weights.gains[i][1], EPS, *w["gated"], tile=tiles.get("gated"), pdl=pdl)
        x = ops.linear_add(h, *w["down"], x, tile=tiles.get("down"), pdl=pdl)
    logits = ops.linear(
        x,
        *weights.matrices["head"][0],
        gain=weights.final_gain,
        eps=EPS,
        dtype=torch.float32,
        tile=tiles.get("head"),
        pdl=pdl,
    )
    if options.advance:
        ops.argmax(logits, state.argmax_scratch, out=state.tokens, advance=state.start, pdl=pdl)
    else:
        ops.argmax(logits, state.argmax_scratch, pdl=pdl)
    return logits


def plain_step(weights: Weights, state: State, dtype: torch.dtype) -> Tensor:
    """The same in plain torch, weights and activations cast to `dtype`; writes nothing. Norm, rotary and softmax in float32."""
    s = weights.shape
    batch = state.start.numel()
    t = state.tokens.numel() // batch

    def dense(pair: tuple[Tensor, Tensor | None]) -> Tensor:
        return (pair[0].float() * pair[1].float() if pair[1] is not None else pair[0]).to(dtype)

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(dtype) * gain.to(dtype)

    def turn(x: Tensor) -> Tensor:  # [B, T, heads, HD]
        at = state.start[:, None] + torch.arange(t, device="cuda")
        c, sn = state.cos[at][:, :, None], state.sin[at][:, :, None]
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * c - b * sn, a * sn + b * c), -1).flatten(-2).to(dtype)

    x = weights.table[state.tokens].to(dtype)
    for i in range(s.layers):
        w = {name: dense(pairs[i]) for name, pairs in weights.matrices.items() if name != "head"}
        qkv = (norm(x, weights.gains[i][0]) @ w["qkv"].T).view(batch, t, -1, s.head_dim)
        q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), 2)
        q, k = turn(q), turn(k)
        outs = []
        for b in range(batch):
            n = int(state.start[b])
            keys, values = (
                torch.cat((cache[i][b, :, :n].to(dtype), new[b].transpose(0, 1)), 1).repeat_interleave(
                    s.heads // s.kv_heads, 0
                )
                for cache, new in ((state.k, k), (state.v, v))
            )
            scores = (q[b].transpose(0, 1) @ keys.transpose(1, 2)).float() / math.sqrt(s.head_dim)
            hidden = torch.arange(n + t, device="cuda")[None] > n + torch.arange(t, device="cuda")[:, None]
            outs.append(
                (scores.masked_fill(hidden, float("-inf")).softmax(-1).to(dtype) @ values).transpose(0, 1).flatten(1)
            )
        x = x + torch.cat(outs) @ w["out"].T
        gate, up = (norm(x, weights.gains[i][1]) @ w["gated"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ w["down"].T
    return (norm(x, weights.final_gain) @ dense(weights.matrices["head"][0]).T).float()


def captured(body: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(graph, what `body` returned while it was captured)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = body()
    return graph, result


def seconds(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        graph.replay()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats


def interleaved(
    graphs: dict[str, torch.cuda.CUDAGraph], rounds: int, repeats: int, before: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """seconds per replay of each, measured in turn, `rounds` times."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            before()
            graph.replay()
            before()
            times[name].append(seconds(graph, repeats))
    return times


@triton.jit
def _read(source, sink, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK, num_stages=4):
        total += tl.load(source + first + tl.arange(0, BLOCK).to(tl.int64))
    if tl.sum(total, 0) == 12345678:
        tl.store(sink, 1)


def read_bandwidth() -> dict[str, float]:
    """Bytes per second of a kernel that only reads 4 GB, for several grids; the largest is the ceiling."""
    n = 2**30 - 2**20
    source = torch.randint(-5, 5, (n,), device="cuda", dtype=torch.int32)
    sink = torch.zeros(1, device="cuda", dtype=torch.int32)
    graphs = {}
    for per_sm, block in ((4, 2048), (8, 2048), (16, 1024), (8, 4096)):
        graphs[f"{per_sm}x{block}"] = captured(lambda p=per_sm, b=block: _read[(132 * p,)](source, sink, n, BLOCK=b))[0]
    times = interleaved(graphs, 5, 3)
    return {name: 4 * n / statistics.median(t) for name, t in times.items()}


# ---- stage: tiles ----------------------------------------------------------------------------------------------------


def candidates(shape: Shape, encoding: str) -> dict[str, list[Tile]]:
    """Tiles worth timing for each matrix with one row."""
    found: dict[str, list[Tile]] = {}
    for name, (_, k, epilogue) in shape.matrices().items():
        half = 2 if epilogue == "gated" else 1
        if encoding == "int8":
            if k <= 4096:
                cut = [(4, 4096, 4, 1), (4, 4096, 8, 1), (8, 4096, 8, 1), (8, 4096, 4, 1), (16, 4096, 8, 1), (4, 4096, 4, 2), (4, 4096, 8, 2),
                       (8, 4096, 8, 2), (4, 4096, 4, 4), (2, 4096, 4, 2), (8, 2048, 4, 1), (16, 2048, 4, 1)]  # fmt: skip
            else:
                cut = [(2, 4096, 8, 1), (4, 4096, 8, 1), (2, 4096, 4, 1), (4, 4096, 16, 1), (2, 4096, 8, 2), (4, 2048, 8, 1), (2, 4096, 16, 1),
                       (4, 4096, 4, 1), (8, 4096, 16, 1), (8, 2048, 8, 1)]  # fmt: skip
            tiles = [
                Tile(r, c, w, b, convert=convert) for r, c, w, b in cut for convert in ("plain", "exact", "offset")
            ]
        else:
            if k <= 2048:
                cut = [(4, 2048, 4, 1), (8, 2048, 4, 1), (8, 2048, 8, 1), (4, 2048, 8, 1), (2, 2048, 4, 1), (4, 2048, 4, 2), (4, 2048, 8, 2),
                       (8, 2048, 8, 2), (16, 2048, 8, 1), (2, 2048, 2, 1), (4, 1024, 2, 1)]  # fmt: skip
            elif k <= 4096:
                cut = [(2, 2048, 4, 1), (4, 2048, 4, 1), (4, 4096, 8, 1), (8, 4096, 8, 1), (2, 4096, 8, 1), (2, 4096, 4, 1), (4, 4096, 16, 1),
                       (8, 4096, 16, 1), (2, 4096, 4, 2), (4, 4096, 8, 2), (2, 4096, 8, 2)]  # fmt: skip
            else:
                cut = [(1, 2048, 4, 1), (2, 2048, 4, 1), (2, 2048, 8, 1), (4, 2048, 8, 1), (1, 4096, 8, 1), (2, 4096, 8, 1), (2, 4096, 16, 1),
                       (4, 4096, 16, 1), (2, 2048, 8, 2), (1, 4096, 8, 2), (2, 1024, 4, 1)]  # fmt: skip
            tiles = [Tile(r, c, w, b) for r, c, w, b in cut]
        found[name] = [t._replace(rows=max(1, t.rows // half)) for t in tiles]
    return found


@functools.cache
def operands(shape: Shape, name: str) -> tuple[Tensor, Tensor, Tensor, ops.Rope]:
    """(x, gain, residual, rope) for one row through a matrix of the kind."""
    n, k, _ = shape.matrices()[name]
    cache = torch.empty(2, 1, shape.kv_heads, 64, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    angle = torch.ones(64, shape.head_dim // 2, device="cuda")
    rope = ops.Rope(angle, angle, torch.zeros(1, device="cuda", dtype=torch.int64), cache[0], cache[1], shape.heads)
    x, gain, residual = (torch.randn(m, device="cuda").bfloat16() for m in (k, k, n))
    return x[None], gain, residual[None], rope


def run_matrix(shape: Shape, name: str, pairs: list[tuple[Tensor, Tensor | None]], tile: Tile | None) -> None:
    """One kernel of the kind, over each of the pairs' weights."""
    x, gain, residual, rope = operands(shape, name)
    epilogue = shape.matrices()[name][2]
    for weight, scale in pairs:
        if epilogue == "rope":
            ops.qkv(x, gain, EPS, weight, scale, rope, tile=tile, early=True)
        elif epilogue == "add":
            ops.linear_add(x, weight, scale, residual, tile=tile)
        elif epilogue == "gated":
            ops.gated(x, gain, EPS, weight, scale, tile=tile)
        else:
            ops.linear(x, weight, scale, gain=gain, eps=EPS, dtype=torch.float32, tile=tile)


def compile_matrix(shape_name: str, encoding: str, name: str, tile: Tile) -> None:
    run_matrix(SHAPES[shape_name], name, one_layer(shape_name, encoding).matrices[name][:1], tile)


@functools.cache
def one_layer(shape_name: str, encoding: str) -> Weights:
    return random_weights(SHAPES[shape_name]._replace(layers=1), encoding)


def compile_step(shape_name: str, encoding: str, rows: int, options: Options) -> None:
    weights = one_layer(shape_name, encoding)
    step(weights, new_state(weights.shape, rows, 1, 512, 200), options)


def compile_attention(shape_name: str, tile: AttentionTile) -> None:
    shape = SHAPES[shape_name]._replace(layers=1)
    state = new_state(shape, 1, 1, 512, 200)
    q = torch.zeros(1, shape.heads * shape.head_dim, device="cuda", dtype=torch.bfloat16)
    ops.attention(q, state.k[0], state.v[0], state.start, state.attention_scratch, tile=tile, early=True)


def compile_one(task: tuple[Any, ...]) -> str:
    """In a worker process: fill Triton's disk cache with one variant."""
    try:
        {"matrix": compile_matrix, "step": compile_step, "attention": compile_attention}[task[0]](*task[1:])
        torch.cuda.synchronize()
    except Exception as error:
        return f"{task}: {error!r}"[:300]
    return ""


def compile_all(tasks: list[tuple[Any, ...]]) -> None:
    """All tasks' kernels, in parallel processes."""
    with concurrent.futures.ProcessPoolExecutor(
        min(15, os.cpu_count() or 1), multiprocessing.get_context("spawn")
    ) as pool:
        for failure in filter(None, pool.map(compile_one, tasks)):
            print("compile:", failure, flush=True)
    print(f"compiled {len(tasks)} tasks; {time.perf_counter() - BEGAN:.0f} s", flush=True)


def sweep(weights: Weights, results: dict[str, Any], budget: float) -> dict[str, Tile]:
    """The fastest tile of each matrix kind."""
    best: dict[str, Tile] = {}
    for name, tiles in candidates(weights.shape, weights.encoding).items():
        pairs = weights.matrices[name] * (8 if name == "head" else 1)
        n_bytes = sum(w.nbytes + (0 if s is None else s.nbytes) for w, s in pairs)
        graphs, by_key = {}, {}
        for tile in tiles:
            key = f"r{tile.rows} c{tile.columns} w{tile.warps} b{tile.blocks} {tile.convert}"
            try:
                graphs[key] = captured(
                    lambda tile=tile, name=name, pairs=pairs: run_matrix(weights.shape, name, pairs, tile)
                )[0]
                by_key[key] = tile
            except Exception as error:
                results[f"{weights.shape.name} {weights.encoding} {name} {key}"] = repr(error)[:200]
        times = interleaved(graphs, 5, 3)
        rates = {key: n_bytes / statistics.median(t) / 1e9 for key, t in times.items()}
        order = sorted(rates, key=lambda key: -rates[key])
        best[name] = by_key[order[0]]
        results[f"{weights.shape.name} {weights.encoding} {name}"] = {key: round(rates[key]) for key in order}
        us = statistics.median(times[order[0]]) / len(pairs) * 1e6
        print(
            f"{weights.shape.name} {weights.encoding} {name}: {us:.1f} us  "
            + "; ".join(f"{key} {rates[key]:.0f}" for key in order[:6])
            + f" ... {order[-1]} {rates[order[-1]]:.0f}",
            flush=True,
        )
        if time.perf_counter() - BEGAN > budget:
            break
    return best


# ---- whole tokens ----------------------------------------------------------------------------------------------------


def whole(
    weights: Weights,
    state: State,
    variants: dict[str, Options],
    ceiling: float,
    results: dict[str, Any],
    rounds: int = 7,
    repeats: int = 10,
) -> dict[str, float]:
    """Median tokens (steps) per second of each variant, checked against torch; prints a line each."""
    start, tokens = state.start.clone(), state.tokens.clone()
    n_rows = state.tokens.numel()
    kv = (
        2
        * sum(int(n) for n in (start + n_rows // start.numel()))
        * weights.shape.kv_heads
        * weights.shape.head_dim
        * 2
        * weights.shape.layers
    )
    n_bytes = weights.bytes_per_token() + kv

    def reset() -> None:
        state.start.copy_(start)
        state.tokens.copy_(tokens)

    truth = plain_step(weights, state, torch.float32)
    yardstick = ((plain_step(weights, state, torch.bfloat16) - truth).norm() / truth.norm()).item()
    graphs, errors = {}, {}
    for key, options in variants.items():
        try:
            graph, logits = captured(lambda options=options: step(weights, state, options))
            reset()
            logits.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            errors[key] = ((logits - truth).norm() / truth.norm()).item()
            if options.advance and not torch.equal(state.tokens, logits.argmax(1)):
                errors[key] = float("nan")
            graphs[key] = graph
        except Exception as error:
            traceback.print_exc()
            results[f"{weights.shape.name} {weights.encoding} {key}"] = repr(error)[:300]
        reset()
    times = interleaved(graphs, rounds, repeats, reset)
    medians = {}
    for key, t in times.items():
        m = medians[key] = 1 / statistics.median(t)
        share = n_bytes * m / ceiling
        label = f"{weights.shape.name} {weights.encoding} rows={n_rows} at {int(start[0])}: {key}"
        results[label] = dict(
            steps_per_second=m,
            low=1 / max(t),
            high=1 / min(t),
            bytes=n_bytes,
            share=share,
            error=errors[key],
            bf16_torch_error=yardstick,
        )
        print(
            f"{label}: {m:.1f}/s [{1 / max(t):.1f}, {1 / min(t):.1f}] {100 * share:.1f}% of read; error {errors[key]:.1e} (bf16 torch {yardstick:.1e})",
            flush=True,
        )
    reset()
    return medians


def descend(
    weights: Weights,
    state: State,
    options: Options,
    choices: dict[str, list[Tile]],
    attention: tuple[AttentionTile, ...],
    results: dict[str, Any],
) -> Options:
    """The best options found by changing one thing at a time in the whole step."""
    start, tokens = state.start.clone(), state.tokens.clone()

    def reset() -> None:
        state.start.copy_(start)
        state.tokens.copy_(tokens)

    def best_of(variants: dict[str, Options]) -> Options:
        graphs = {}
        for key, variant in variants.items():
            try:
                graphs[key] = captured(lambda variant=variant: step(weights, state, variant))[0]
            except Exception as error:
                print("descend:", key, repr(error)[:200], flush=True)
            reset()
        times = {key: statistics.median(t) for key, t in interleaved(graphs, 5, 4, reset).items()}
        order = sorted(times, key=lambda key: times[key])
        print(
            f"{weights.shape.name} {weights.encoding} " + "; ".join(f"{key} {1 / times[key]:.1f}" for key in order),
            flush=True,
        )
        results.setdefault("descend", []).append(
            {f"{weights.shape.name} {weights.encoding}": {k: 1 / times[k] for k in order}}
        )
        return variants[order[0]]

    def label(tile: Tile) -> str:
        kind = (
            f"s{tile.stages} a{tile.ahead} x{tile.slices}"
            if not tile.vector and state.tokens.numel() > 1
            else tile.convert
        )
        return f"{tuple(tile)[:4]} {kind}"

    def with_tile(name: str, tile: Tile) -> Options:
        return options._replace(tiles={**options.tiles, name: tile})

    options = best_of({f"attention {tuple(a)}": options._replace(attention=a) for a in attention})
    for name, tiles in choices.items():
        options = best_of({f"{name} {label(t)}": with_tile(name, t) for t in tiles})
    return options


SHORT = (
    AttentionTile(64, 8, 64, 4, 1),
    AttentionTile(64, 4, 64, 4, 1),
    AttentionTile(32, 8, 32, 2, 1),
    AttentionTile(32, 8, 32, 2, 1, True),
)
LONG = (
    AttentionTile(64, 16, 64, 4, 2),
    AttentionTile(64, 8, 64, 4, 1),
    AttentionTile(64, 16, 64, 4, 1),
    AttentionTile(64, 8, 64, 4, 2),
    AttentionTile(32, 16, 32, 2, 2),
    AttentionTile(64, 16, 64, 8, 2),
)


def several(rows: int, encoding: str) -> dict[str, list[Tile]]:
    """Tiles to try with 2 to 8 rows of activations, matrix by matrix; "gated" counts its gate rows."""
    cuts = [
        (16, 256, 1, 5),
        (16, 256, 2, 5),
        (16, 256, 4, 5),
        (16, 512, 2, 3),
        (16, 512, 4, 3),
        (16, 512, 4, 4),
        (16, 1024, 8, 2),
        (16, 1024, 8, 3),
        (32, 256, 2, 4),
        (32, 512, 4, 3),
    ]
    dots = [Tile(r, c, w, stages=stages, slices=w, ahead=ahead) for r, c, w, stages in cuts for ahead in (0, 1)]
    more = [(512, 2, 3, 2), (512, 4, 2, 3), (512, 4, 3, 3), (512, 4, 4, 2), (1024, 8, 1, 4), (1024, 8, 3, 2)]
    dots += [Tile(16, c, w, stages=stages, slices=w, ahead=ahead) for c, w, stages, ahead in more]
    found = {name: [*dots] for name in SHAPES["7b"].matrices()}
    found["gated"] = [tile._replace(rows=tile.rows // 2) for tile in dots]
    if rows > 2 or encoding == "int8":  # int8 in registers, once for each row: 290 to 328 steps/s where dots give 353
        return found
    registers = {
        "qkv": [(2, 4096, 4, 2), (4, 4096, 8, 2)],
        "out": [(2, 4096, 8, 2), (2, 4096, 8, 1)],
        "gated": [(1, 4096, 8, 2), (2, 4096, 8, 2)],
        "down": [(2, 4096, 8, 1), (1, 4096, 16, 2)],
        "head": [(2, 4096, 8, 2)],
    }
    for name, blocks in registers.items():
        found[name] += [Tile(*cut, vector=True) for cut in blocks]
    return found


SEVERAL = ((2, "int8"), (5, "bf16"), (8, "bf16"), (8, "int8"), (2, "bf16"))
"""Rows and encodings of interest: a draft's first step of a round, checks of 4 and 7 proposals."""
FEW_QUERIES = (
    AttentionTile(128, 2, 128, 8, 1),
    AttentionTile(64, 4, 64, 4, 1),
    AttentionTile(64, 2, 64, 4, 2),
    AttentionTile(64, 8, 64, 4, 1),
    AttentionTile(64, 4, 128, 4, 2),
    AttentionTile(32, 4, 64, 4, 1),
)


def tops(shape_name: str, encoding: str) -> dict[str, list[Tile]]:
    """Tiles worth trying in a whole token, the best known first."""
    if encoding == "int8":
        cuts = {
            "qkv": [
                (8, 2048, 4, 1),
                (8, 4096, 4, 1),
                (4, 4096, 4, 2),
                (8, 2048, 4, 2),
                (16, 2048, 8, 1),
                (4, 2048, 4, 2),
            ],
            "out": [
                (4, 4096, 8, 2),
                (8, 4096, 4, 1),
                (8, 4096, 8, 1),
                (4, 4096, 4, 2),
                (4, 4096, 4, 1),
                (8, 2048, 4, 1),
            ],
            "gated": [
                (2, 4096, 4, 2),
                (4, 2048, 4, 1),
                (4, 4096, 4, 1),
                (2, 4096, 4, 3),
                (4, 2048, 4, 2),
                (2, 4096, 8, 2),
            ],
            "down": [
                (2, 4096, 4, 1),
                (4, 4096, 4, 1),
                (2, 4096, 4, 2),
                (4, 4096, 8, 1),
                (2, 4096, 8, 2),
                (4, 2048, 4, 1),
            ],
            "head": [(4, 4096, 4, 2)],
        }
        return {
            name: [Tile(*cut, convert="exact") for cut in found[:2]] + [Tile(*cut, convert="offset") for cut in found]
            for name, found in cuts.items()
        }
    cuts = {
        "1b": {
            "qkv": [(8, 2048, 4, 1), (4, 1024, 2, 1), (8, 1024, 2, 1), (16, 1024, 4, 1), (4, 2048, 4, 1)],
            "out": [(2, 2048, 2, 1), (2, 2048, 4, 1), (4, 2048, 8, 1), (2, 1024, 1, 1), (4, 2048, 2, 1)],
            "gated": [(2, 2048, 4, 2), (4, 2048, 4, 2), (2, 2048, 4, 3), (2, 2048, 2, 2), (4, 2048, 8, 2)],
            "down": [
                (1, 4096, 8, 2),
                (1, 8192, 8, 1),
                (2, 8192, 8, 1),
                (1, 4096, 8, 3),
                (2, 4096, 8, 2),
                (1, 4096, 4, 2),
            ],
            "head": [(4, 2048, 8, 2)],
        },
        "7b": {
            "qkv": [(2, 4096, 4, 2)],
            "out": [(2, 4096, 8, 2)],
            "gated": [(2, 4096, 8, 2)],
            "down": [(1, 4096, 8, 2)],
            "head": [(2, 4096, 8, 2)],
        },
    }[shape_name]
    return {name: [Tile(*cut) for cut in found] for name, found in cuts.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("decode-kernels"))
    parser.add_argument("--stages", default="tiles,tokens,long,rows")
    parser.add_argument("--budget", type=float, default=240.0)
    arguments = parser.parse_args()
    stages = arguments.stages.split(",")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }

    def save() -> None:
        (arguments.out / "decode-kernels.json").write_text(json.dumps(results, indent=1, default=str))

    def late() -> bool:
        return time.perf_counter() - BEGAN > arguments.budget

    plans = [("7b", "int8"), ("7b", "bf16"), ("1b", "bf16")]
    tasks: list[tuple[Any, ...]] = []
    if "tiles" in stages:
        tasks += [
            ("matrix", s, e, name, tile)
            for s, e in plans
            for name, tiles in candidates(SHAPES[s], e).items()
            for tile in tiles
        ]
    chosen = {(s, e): tops(s, e) for s, e in plans}
    if "descend" in stages:
        tasks += [("attention", s, a) for s in ("7b", "1b") for a in SHORT]
        for (s, e), choices in chosen.items():
            tasks += [("matrix", s, e, name, tile) for name, tiles in choices.items() for tile in tiles]
    if "long" in stages:
        tasks += [("attention", s, a) for s in ("7b", "1b") for a in LONG]
    if "rows" in stages:
        tasks += [
            ("step", "7b", e, rows, Options({name: tile}, advance=False))
            for rows, e in SEVERAL
            for name, tiles in several(rows, e).items()
            for tile in tiles
        ]
        tasks += [
            ("step", "7b", "bf16", rows, Options(attention=a, advance=False)) for a in FEW_QUERIES for rows in (2, 5, 8)
        ]
    compile_all(tasks)
    rates = read_bandwidth()
    ceiling = max(rates.values())
    results["read_bytes_per_second"] = rates
    print("read", {k: f"{v / 1e9:.0f}" for k, v in rates.items()}, flush=True)
    for shape_name, encoding in plans:
        if late():
            break
        shape = SHAPES[shape_name]
        weights = random_weights(shape, encoding)
        tiles: dict[str, Tile] = {}
        try:
            if "tiles" in stages:
                tiles = sweep(weights, results, arguments.budget)
                results[f"best {shape_name} {encoding}"] = {name: tile._asdict() for name, tile in tiles.items()}
                save()
            base = Options(tiles)
            if "descend" in stages:
                choices = chosen[shape_name, encoding]
                first = Options({name: found[0] for name, found in choices.items()})
                state = new_state(shape, 1, 1, 512, 200)
                base = descend(weights, state, first, choices, SHORT, results)
                results[f"descended {shape_name} {encoding}"] = repr(base)
                print(base, flush=True)
                save()
            if "tokens" in stages:
                state = new_state(shape, 1, 1, 512, 200)
                variants = {"best": base}
                whole(weights, state, variants, ceiling, results)
                save()
                del state
            if "long" in stages and not late():
                variants = {f"attention {tuple(a)}": base._replace(attention=a) for a in LONG}
                state = new_state(shape, 1, 1, 4608, 4096)
                whole(weights, state, variants, ceiling, results, rounds=5)
                save()
                del state
            if "rows" in stages and shape_name == "7b":
                for rows in (rows for rows, kind in SEVERAL if kind == encoding and not late()):
                    choices = several(rows, encoding)
                    state = new_state(shape, rows, 1, 512, 200)
                    first = Options({name: found[0] for name, found in choices.items()}, advance=False)
                    best = descend(weights, state, first, choices, FEW_QUERIES, results)
                    results[f"descended {shape_name} {encoding} rows={rows}"] = repr(best)
                    print(rows, best, flush=True)
                    variants = {"in use": Options(advance=False), "descended": best}
                    whole(weights, state, variants, ceiling, results, rounds=5, repeats=5)
                    save()
                    del state
        except Exception:
            traceback.print_exc()
        del weights
        torch.cuda.empty_cache()
        print(f"{time.perf_counter() - BEGAN:.0f} s", flush=True)
    save()


if __name__ == "__main__":
    main()

"""Tensor parallelism on the GPUs of one host, in one command: latencies, one GPU, several, the oracle's word on each.

    export PYTHONPATH=.
    python tests/gpu/tensor_parallel.py --out DIR                        two ranks and one, fused plans: about five minutes
    python tests/gpu/tensor_parallel.py --out DIR --ranks 1,2,4 --model random:llama-2-70b --encodings int8
    python tests/gpu/tensor_parallel.py --out DIR --simulate 2           one GPU: a shard's arithmetic, nobody to talk to

Every stage is a process (or a job of `torch.distributed.run`) with a limit of its own, so that one that hangs costs no
other; what is known is in DIR/tensor_parallel.json after every stage. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_fast.compilers.compiled import Compiled
from llama_fast.compilers.graphed import Graphed
from llama_fast.engine.runner import Runner
from llama_fast.kernels import ops, tuning
from llama_fast.ladder.bench import Witnesses, Work, bench
from llama_fast.ladder.rungs import Rung
from llama_fast.parallel.alone import Whole
from llama_fast.parallel.ranks import Place, exchanger_named, tensor_parallel
from llama_fast.parallel.tensor_parallel import Exchanger, OverGroup, TensorParallel
from llama_fast.plan import Plan
from llama_fast.recipes import encoding_named, fused, optimised
from llama_ref.models import resolve
from oracle.verify import judge_runner

ROOT = Path(__file__).resolve().parents[2]
SIZES_KB = (8, 16, 32, 64, 128, 256)
KINDS = ("group", "one-shot", "exchange")


class Printed:
    """Progress as lines, of rank 0 alone."""

    def say(self, text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"    {time.strftime('%H:%M:%S')} {text}", flush=True)

    def sample(self, rung: str, tokens_per_second: float) -> None:
        self.say(f"{rung}: {tokens_per_second:.1f} tokens/s")


class Silent(OverGroup):
    """Nobody to talk to: a shard's own arithmetic and the launches around it, for a lower bound on its time."""

    def __init__(self, device: torch.device):
        from llama_fast.kernels.exchange import BLOCK, WORDS, Exchange
        from llama_fast.kernels.packets import Mailbox

        memory = torch.zeros(2, 1, WORDS, dtype=torch.int64, device=device)
        inboxes = torch.tensor([memory.data_ptr()], device=device)
        epochs = torch.zeros(WORDS // BLOCK, dtype=torch.int32, device=device)
        self.exchange = Exchange(Mailbox(0, 1, WORDS, BLOCK, inboxes, epochs), memory)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return x if residual is None else self.exchange.sum(x, residual)

    def gather(self, part: torch.Tensor, first: int, columns: int) -> torch.Tensor:
        return torch.nn.functional.pad(part, (first, columns - first - part.shape[-1]))


def plan_named(name: str, encoding: str, shard: Any) -> Plan:
    plan = fused(encoding_named(encoding)) if name == "fused" else optimised(encoding_named(encoding), compile=True)
    assert isinstance(plan.compiler, Graphed if name == "fused" else Compiled)
    return dataclasses.replace(plan, shard=shard)


def decode(options: argparse.Namespace, shard: Any, device: torch.device) -> dict[str, Any]:
    """The rungs asked for, by the library's own bench."""
    found = resolve(options.model)
    checkpoint = found.open(device, torch.bfloat16)
    prompt = found.tokenizer().encode("Hello, my name is")

    def judge(runner: Runner, cache_length: int | None) -> str:
        if options.no_oracle:
            return "NOT ASKED"
        return judge_runner(runner, checkpoint, prompt, cache_length=cache_length).outcome.value

    results = []
    for encoding in options.encodings.split(","):
        for name in options.plans.split(","):
            rung = Rung(f"{name} {encoding}", "", plan_named(name, encoding, shard), needs_gpu=True)
            work = Work(prompt, samples=options.samples)
            ladder = bench(checkpoint, options.model, [rung], device, work, Witnesses(judge, Printed()))
            torch.cuda.empty_cache()
            results.append(
                {
                    "gpu": ladder.device,
                    "read_gb_per_s": ladder.read_bandwidth_gb_per_s,
                    **dataclasses.asdict(ladder.rungs[0]),
                }
            )
    return {"rungs": results}


def on_ranks(options: argparse.Namespace) -> None:
    """`decode` on every rank; the memory and the verdicts of all of them."""
    with tensor_parallel("cuda", exchanger=options.exchanger) as shard:
        device = torch.device("cuda", torch.cuda.current_device())
        mine = decode(options, shard, device)
        everyone: list[Any] = [None] * shard.size
        dist.all_gather_object(everyone, mine)
        for i, rung in enumerate(mine["rungs"]):
            rung["exchanger"] = options.exchanger or type(shard.all_reduce).__name__
            for key in ("peak_memory_gb", "weights_gb", "verdict"):
                rung[f"{key}_by_rank"] = [other["rungs"][i][key] for other in everyone]
        write(options, mine)  # before the ranks part: whatever happens then, this is known


def latency(options: argparse.Namespace) -> None:
    """Microseconds of one sum inside a CUDA graph, by kind and size; and whether each kind's sums are NCCL's."""
    place = Place.of_environment()
    assert place is not None
    with tensor_parallel("cuda", exchanger="group"):
        device = torch.device("cuda", torch.cuda.current_device())
        found: dict[str, Any] = {}
        for kind in KINDS:
            try:
                found[kind] = latencies(exchanger_named(kind, place, device), place, device)
            except Exception as error:  # the other kinds are still worth knowing
                found[kind] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            Printed().say(f"{kind}: {found[kind]}")
        write(options, {"latency_us": found})


def latencies(exchanger: Exchanger, place: Place, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"wrong": faults(exchanger, place, device)}
    for kilobytes in SIZES_KB:
        x = torch.randn(kilobytes * 512, device=device).bfloat16()
        found[f"{kilobytes} KB"] = round(microseconds(partial(exchanger, x)), 2)
    # as a fused step uses it: float32 in, the residual added; and the logits
    x, residual = torch.randn(4096, device=device), torch.randn(4096, device=device).bfloat16()
    found["4096 float32 + residual"] = round(microseconds(partial(exchanger, x, residual)), 2)
    first, last = 32000 * place.rank // place.size, 32000 * (place.rank + 1) // place.size
    part = torch.randn(1, last - first, device=device)
    found["gather 32000 float32"] = round(microseconds(partial(exchanger.gather, part, first, 32000)), 2)
    return found


def faults(exchanger: Exchanger, place: Place, device: torch.device) -> list[str]:
    """Cases in which a kind differs from float64 sums by more than bf16's or float32's rounding; empty is right."""
    wrong = []
    for step in range(200):
        n = (4096, 8192, 4096 * 8, 130, 131072)[step % 5]
        parts = [
            torch.randn(n, device=device, generator=torch.Generator(device).manual_seed(1000 * step + r)).bfloat16()
            for r in range(place.size)
        ]
        if step % 7 == place.rank:
            torch.cuda._sleep(200_000)  # one rank is late
        exact = torch.stack(parts).double().sum(0)
        got = exchanger(parts[place.rank].clone())
        if (got.double() - exact).abs().max() > 0.02 * place.size:
            wrong.append(f"sum {step} of {n}")
        if n < 10_000:
            residual = torch.randn(n, device=device, generator=torch.Generator(device).manual_seed(step)).bfloat16()
            added = exchanger(parts[place.rank].float(), residual)
            if added.dtype != residual.dtype or (added.double() - exact - residual).abs().max() > 0.03 * place.size:
                wrong.append(f"add {step} of {n}")
            drawn = torch.randn(
                n + 1, 64 * place.size, device=device, generator=torch.Generator(device).manual_seed(step)
            )
            x, weight = drawn.bfloat16().split((1, n))
            mine = slice(64 * place.rank, 64 * (place.rank + 1))
            held = x[:, mine].contiguous(), weight[:, mine].contiguous(), None
            if exchanger.exchange is not None and not exchanger.exchange.apart:
                product = exchanger.exchange.add_product(*held, residual[None])
            else:
                product = exchanger(ops.linear(*held, dtype=torch.float32), residual[None])
            exact = x.double() @ weight.double().T + residual.double()
            if (product.double() - exact).abs().max() > 0.004 * exact.abs().max():
                wrong.append(f"product {step} of {n}")
            whole = torch.randn(3, n, device=device, generator=torch.Generator(device).manual_seed(step))
            first, last = n * place.rank // place.size, n * (place.rank + 1) // place.size
            if not torch.equal(exchanger.gather(whole[:, first:last].contiguous(), first, n), whole):
                wrong.append(f"gather {step} of {n}")
    return wrong


def microseconds(do: Callable[[], Any], calls: int = 64, replays: int = 20) -> float:
    """One call's time inside a graph of `calls`, the best of several replays."""
    do()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            do()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(replays):
        dist.barrier()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / calls)
    return best


def stage(name: str, ranks: int, options: argparse.Namespace, limit_seconds: float, *extra: str) -> dict[str, Any]:
    """Run one stage as a process of its own; its result, or what stopped it."""
    result = Path(tempfile.mkdtemp()) / "result.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, __file__, "--out", str(result), "--stage", name.split()[0], *extra]
    for key in ("model", "plans", "encodings", "samples"):
        command += [f"--{key}", str(getattr(options, key))]
    command += ["--tiles", options.tiles] if options.tiles else []
    command += ["--no-oracle"] if options.no_oracle else []
    off = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
    environment = {**os.environ, **off, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    print(f"{name}: {' '.join(command[1:])}", flush=True)
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    try:
        code: int | str = process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code = f"killed after {limit_seconds:.0f} s"
        process.wait()
    seconds = round(time.perf_counter() - began, 1)
    found = json.loads(result.read_text()) if result.exists() else {}
    return {"stage": name, "ranks": ranks, "exit": code, "seconds": seconds, **found}


def summary(stages: list[dict[str, Any]]) -> list[str]:
    """Speed of every rung, and its ratio to the same plan on one GPU."""
    rungs = [{**rung, "ranks": s["ranks"], "stage": s["stage"]} for s in stages for rung in s.get("rungs", [])]
    alone = {
        rung["name"]: rung["tokens_per_second"]["median"]
        for rung in rungs
        if rung["ranks"] == 1 and rung["stage"] == "decode 1"
    }
    lines = []
    for rung in rungs:
        rate = rung["tokens_per_second"]
        ratio = f"{rate['median'] / alone[rung['name']]:.2f}x" if rung["name"] in alone else "-"
        lines.append(
            f"{rung['stage']:24} {rung['name']:16} {rate['median']:7.1f} ({rate['min']:.1f}-{rate['max']:.1f}) tokens/s {ratio:6}"
            f"  floor {rung['floor_tokens_per_second']:.0f}  memory {rung['peak_memory_gb']:.2f} GB a rank  {rung['verdict']}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="random:llama-2-7b")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--plans", default="fused")
    parser.add_argument("--encodings", default="dense,int8")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--no-oracle", action="store_true")
    parser.add_argument(
        "--exchangers", default="exchange,one-shot,group", help="the first with the oracle, the others without"
    )
    parser.add_argument("--latency-only", action="store_true", help="sums and gathers alone, no model")
    parser.add_argument("--simulate", type=int, default=0)
    parser.add_argument("--tiles", help="files of shard_tiles.py whose rows are to be used, with commas between")
    parser.add_argument("--limit", type=float, default=150, help="seconds that a stage may take")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--exchanger", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for file in options.tiles.split(",") if options.tiles else ():
        rows = [row for found in json.loads(Path(file).read_text()) for row in found["tiles"]]
        tuning.ONE_ROW.update({tuple(key): tuning.Tile(*tile) for key, tile in rows})
    if options.stage:
        work = {"latency": latency, "ranks": on_ranks, "decode": alone, "simulate": simulated}[options.stage]
        work(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    counts = [int(word) for word in options.ranks.split(",")]
    stages = []

    def done(result: dict[str, Any]) -> None:
        stages.append(result)
        print(f"  exit {result['exit']} after {result['seconds']} s", flush=True)
        (options.out / "tensor_parallel.json").write_text(
            json.dumps({"model": options.model, "stages": stages}, indent=1)
        )

    for ranks in counts:
        if ranks > 1:
            done(stage(f"latency {ranks}", ranks, options, 100))
    if options.latency_only:
        return
    if 1 in counts:
        done(stage("decode 1", 1, options, options.limit))
    if options.simulate:
        done(stage(f"simulate {options.simulate}", 1, options, options.limit, "--ranks", str(options.simulate)))
    first, *others = options.exchangers.split(",")
    for kind in (first, *others):
        options.no_oracle, options.samples = (options.no_oracle, options.samples) if kind == first else (True, 2)
        for ranks in counts:
            if ranks > 1:
                done(stage(f"ranks {ranks} {kind}", ranks, options, options.limit, "--exchanger", kind))
    print("\n".join(summary(stages)))


def alone(options: argparse.Namespace) -> None:
    write(options, decode(options, Whole(), torch.device("cuda")))


def write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    if os.environ.get("RANK", "0") == "0":
        options.out.write_text(json.dumps(found, indent=1))


def simulated(options: argparse.Namespace) -> None:
    """Rank 0's share of the arithmetic alone: the tokens are wrong, and nobody is asked."""
    options.no_oracle = True
    device = torch.device("cuda")
    write(options, decode(options, TensorParallel(0, int(options.ranks), Silent(device)), device))


if __name__ == "__main__":
    main()

"""The ladder's rungs that take several processes: a job of `torch.distributed.run` climbs them, and its results come back.

The job is `llama-fast bench` itself, which under a launcher climbs such rungs and no others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from llama_fast.ladder.bench import Ladder, RungResult, Spread
from llama_fast.ladder.rungs import Rung
from llama_fast.parallel.tensor_parallel import TensorParallel
from llama_ref.config import LlamaConfig

ENDING_SECONDS = 45  # the launcher's own patience with a rank that does not end is 30


def ranks_for(config: LlamaConfig, device: torch.device) -> int:
    """On GPUs as many of the visible ones as the model divides over; on a CPU the fewest above one. ValueError if none."""
    most, on_gpu = config.n_heads, device.type == "cuda"
    if on_gpu:
        most = torch.cuda.device_count()
        if most < 2:
            raise ValueError(f"rungs over several ranks need two GPUs, {most} is visible")
    sizes = [size for size in range(2, most + 1) if divides(config, size)]
    if not sizes:
        upto = f"of the {most} GPUs" if on_gpu else "of ranks"
        raise ValueError(
            f"n_heads={config.n_heads}, n_kv_heads={config.n_kv_heads} and ffn_dim={config.ffn_dim} "
            f"divide over no number {upto} above one"
        )
    return max(sizes) if on_gpu else min(sizes)


def divides(config: LlamaConfig, ranks: int) -> bool:
    """Whether every rank gets an equal part of the model."""
    try:
        TensorParallel(0, ranks).local_config(config)
    except ValueError:
        return False
    return True


def divided(rungs: Sequence[Rung], shard: TensorParallel, device: torch.device) -> list[Rung]:
    """The rungs as one rank climbs them; ValueError for one that is made for a single process."""
    alone = [rung.name for rung in rungs if not rung.over_ranks]
    if alone:
        raise ValueError(f"{shard.size} ranks were started, and {', '.join(alone)} is for one process: run it without")
    return [
        dataclasses.replace(rung, plan=dataclasses.replace(rung.plans(device)[0], shard=shard), on_gpu=None)
        for rung in rungs
    ]


def of_all_ranks(ladder: Ladder, shard: TensorParallel) -> Ladder:
    """Rank 0's measurements with every rank's memory, and a verdict that all share."""
    everyone: list[list[tuple[str, float]]] = [[] for _ in range(shard.size)]
    dist.all_gather_object(everyone, [(rung.verdict, rung.peak_memory_gb) for rung in ladder.rungs])
    rungs = []
    for rung, said in zip(ladder.rungs, zip(*everyone), strict=True):
        verdict = next((word for word, _ in said if word != "AGREE"), "AGREE")
        memory = [of_rank for _, of_rank in said]
        rungs.append(dataclasses.replace(rung, verdict=verdict, ranks=shard.size, memory_by_rank_gb=memory))
    return dataclasses.replace(ladder, rungs=rungs)


def climb(rungs: Sequence[Rung], ranks: int, arguments: Sequence[str], say: Callable[[str], None]) -> list[RungResult]:
    """`llama-fast bench` with these arguments on so many ranks of this host. Raises ValueError with a rank's own words."""
    names = ",".join(rung.name for rung in rungs)
    say(f"{names}: starting {ranks} ranks")
    with tempfile.TemporaryDirectory() as out:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [
            sys.executable,
            *launcher,
            "-m",
            "llama_fast.ladder.cli",
            "bench",
            "--rungs",
            names,
            "--out",
            out,
            *arguments,
        ]
        threads = str(max(1, torch.get_num_threads() // ranks))
        said = talk(command, {**os.environ, "OMP_NUM_THREADS": threads}, say)
        result = Path(out, "ladder.json")
        if not result.exists():
            reasons = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
            raise ValueError(f"{names} on {ranks} ranks: {reasons[0] if reasons else 'the job ended without a result'}")
        found = json.loads(result.read_text())["rungs"]
    return [RungResult(**{**rung, "tokens_per_second": Spread(**rung["tokens_per_second"])}) for rung in found]


def talk(command: Sequence[str], environment: dict[str, str], say: Callable[[str], None]) -> list[str]:
    """Run a job to its end and pass on its progress; what it printed. If we are stopped, so is the job."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    said: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.rstrip())
            if line.startswith("  ") and ": " in line:
                say(line.strip())
    finally:
        if process.stdout is not None:
            process.stdout.close()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return said

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
from llama_fast.parallel.ranks import Member, check_stages
from llama_fast.parallel.stages import Stages
from llama_fast.parallel.tensor_parallel import TensorParallel
from llama_ref.config import LlamaConfig

ENDING_SECONDS = 45  # the launcher's own patience with a rank that does not end is 30


def ranks_for(config: LlamaConfig, device: torch.device, rung: Rung) -> int:
    """On GPUs as many of the visible ones as the model divides over; on a CPU the fewest that make the rung.

    ValueError, with the numbers, if there are none.
    """
    least = least_ranks(rung)
    most, on_gpu = rung.stages_of(config.n_layers) * config.n_heads, device.type == "cuda"
    if on_gpu:
        most = torch.cuda.device_count()
        if most < least:
            raise ValueError(f"the rung {rung.name} needs {least} GPUs, {most} {'is' if most == 1 else 'are'} visible")
    sizes = [size for size in range(least, most + 1) if divides(config, size, rung)]
    if not sizes:
        upto = f"of the {most} GPUs" if on_gpu else "of ranks"
        raise ValueError(
            f"n_layers={config.n_layers}, n_heads={config.n_heads}, n_kv_heads={config.n_kv_heads} and "
            f"ffn_dim={config.ffn_dim} divide over no number {upto} from {least} on as {rung.name} has them"
        )
    return max(sizes) if on_gpu else min(sizes)


def least_ranks(rung: Rung) -> int:
    """The fewest ranks that a rung is for: two, or of several stages two each."""
    return 2 * max(1, rung.stages)


def divides(config: LlamaConfig, ranks: int, rung: Rung) -> bool:
    """Whether every rank gets a part of the model, and an equal one of its stage."""
    stages = rung.stages_of(ranks)
    try:
        check_stages(ranks, stages)
        Stages(0, stages, TensorParallel(0, ranks // stages)).local_config(config)
    except ValueError:
        return False
    return True


def divided(rungs: Sequence[Rung], member: Member, device: torch.device) -> list[Rung]:
    """The rungs as one rank climbs them; ValueError for one that is made for a single process, or for other ranks."""
    alone = [rung.name for rung in rungs if not rung.over_ranks]
    if alone:
        raise ValueError(f"{member.size} ranks were started, and {', '.join(alone)} is for one process: run it without")
    stages = {rung.stages_of(member.size) for rung in rungs}
    for rung in rungs:
        if rung.stages > 1 and member.size < least_ranks(rung):
            raise ValueError(f"the rung {rung.name} needs {least_ranks(rung)} ranks, {member.size} were started")
    shards = {count: member.in_stages(count) for count in sorted(stages)}
    return [
        dataclasses.replace(
            rung,
            plan=dataclasses.replace(rung.plans(device)[0], shard=shards[rung.stages_of(member.size)]),
            on_gpu=None,
        )
        for rung in rungs
    ]


def of_all_ranks(ladder: Ladder, size: int) -> Ladder:
    """Rank 0's measurements with every rank's memory, and a verdict that all share."""
    everyone: list[list[tuple[str, float]]] = [[] for _ in range(size)]
    dist.all_gather_object(everyone, [(rung.verdict, rung.peak_memory_gb) for rung in ladder.rungs])
    rungs = []
    for rung, said in zip(ladder.rungs, zip(*everyone), strict=True):
        verdict = next((word for word, _ in said if word != "AGREE"), "AGREE")
        memory = [of_rank for _, of_rank in said]
        rungs.append(dataclasses.replace(rung, verdict=verdict, ranks=size, memory_by_rank_gb=memory))
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

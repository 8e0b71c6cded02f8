#!/usr/bin/env bash
# Date:    2026-11-28
# Package: torch 2.13.0 (torch.distributed.pipelining, ScheduleGPipe, gloo on a CPU)
# Guess:   schedule.step(x) takes any batch that the microbatches divide, or refuses a shape other than the first.
# Seen:    the receive buffers keep the first call's shape, and gloo takes a shorter message into a longer buffer without a
#          word. A smaller batch afterwards comes out in the FIRST call's shape; the rows that were not sent hold the
#          batch before.
# Matters: a server that runs a pipeline with 4 requests and then with 2 gets 4 answers: rows 0 and 2 are new,
#          rows 1 and 3 belong to the requests before. Whoever takes the first two rows mixes one user's answer with another's.
# Output:  2 rows of 5.0 give [[501], [701], [501], [701]]; expected [[501], [501]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe


class Digit(nn.Module):
    """Append the stage's number to the input's decimal digits: 5 -> 50 -> 501."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, x):
        return x * 10 + self.stage


@torch.no_grad()
def work(rank, meeting_file):
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{meeting_file}")
    stage = PipelineStage(Digit(rank), rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2)
    seen = []
    for batch in (torch.full((4, 1), 7.0), torch.full((2, 1), 5.0)):
        result = schedule.step(batch) if rank == 0 else schedule.step()
        seen.append(result)
        dist.barrier()
    if rank == 1:
        print("torch", torch.__version__)
        print("4 rows of 7: expected and seen", seen[0].tolist())
        print("2 rows of 5: expected", [[501.0], [501.0]])
        print("2 rows of 5: seen    ", seen[1].tolist())
        assert seen[0].tolist() == [[701.0]] * 4
        assert seen[1].tolist() == [[501.0], [701.0], [501.0], [701.0]], "the behaviour has changed"
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/demo.py" "$folder/meeting"

#!/usr/bin/env bash
# Date:    2026-11-28
# Package: torch 2.13.0 (torch.distributed, gloo backend)
# Guess:   all_reduce gives every rank the same numbers, and MAX and MIN treat NaN as torch.maximum does: NaN wins.
# Seen:    whether the NaN survives depends on which rank holds it. With two ranks a NaN on rank 0 reaches both ranks;
#          a NaN on rank 1 is gone on both, rank 1 included: its own NaN was replaced by the other rank's number.
# Matters: a global amax for a quantisation scale, or a "did anything overflow" check by MAX, passes although one rank's
#          tensor holds NaN. SUM keeps it.
# Output:  MAX with the NaN on rank 0: [nan, nan]; on rank 1: [1.0, 1.0]; MIN the same; SUM [nan, nan] in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import math
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def reduced(rank, holder, op):
    """Reduce 1.0 and NaN, where the rank `holder` brings the NaN; return what every rank got."""
    value = torch.tensor([math.nan if rank == holder else 1.0])
    dist.all_reduce(value, op)
    seen = [None] * WORLD
    dist.all_gather_object(seen, value.item())
    return seen


def work(rank, meeting_file):
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method=f"file://{meeting_file}")
    seen = {
        (name, holder): reduced(rank, holder, getattr(dist.ReduceOp, name))
        for name in ("SUM", "MAX", "MIN")
        for holder in range(WORLD)
    }
    if rank == 0:
        print("torch", torch.__version__)
        print("torch.maximum(1, nan) =", torch.maximum(torch.tensor(1.0), torch.tensor(math.nan)).item())
        print("expected: nan on both ranks, in every line")
        for (name, holder), values in seen.items():
            print(f"seen: {name} with the NaN on rank {holder}: {values}")
        assert all(math.isnan(x) for h in range(WORLD) for x in seen["SUM", h])
        for name in ("MAX", "MIN"):
            assert all(math.isnan(x) for x in seen[name, 0]), "the behaviour has changed"
            assert seen[name, 1] == [1.0, 1.0], "the behaviour has changed"
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=WORLD)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/demo.py" "$folder/meeting"

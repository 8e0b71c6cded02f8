#!/usr/bin/env bash
# Date:    2026-11-28
# Package: torch 2.13.0 (torch.distributed.tensor, gloo on a CPU)
# Guess:   x.cumsum(-1) and x.cumsum(1) of a matrix are the same call; an operator on a DTensor gives the full tensor's
#          result, or raises if it has no sharding rule.
# Seen:    with the last dimension sharded, cumsum(1) gathers and is right; cumsum(-1) sums each rank's shard on its own
#          and calls the result Shard(1). No warning. sum, softmax and sort take -1 and are right.
# Matters: top-p and inverse-CDF sampling take softmax(logits).cumsum(-1); with logits sharded by vocabulary, the
#          running sum starts again at zero on every rank, and another token is drawn.
# Output:  cumsum(1) [0.1, 0.3, 0.6, 1.0]; cumsum(-1) [0.1, 0.3, 0.3, 0.7]; token drawn at 0.55: 2 and 3
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

WORLD = 2


def work(rank, meeting_file):
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method=f"file://{meeting_file}")
    mesh = init_device_mesh("cpu", (WORLD,))
    full = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    sharded = distribute_tensor(full, mesh, [Shard(1)])
    # The neighbours take -1 and are right.
    assert torch.allclose(sharded.sum(-1).full_tensor(), full.sum(-1))
    assert torch.allclose(sharded.softmax(-1).full_tensor(), full.softmax(-1))
    assert torch.equal(sharded.sort(-1).values.full_tensor(), full.sort(-1).values)
    results = {dim: sharded.cumsum(dim) for dim in (1, -1)}
    whole = {dim: result.full_tensor() for dim, result in results.items()}
    # Inverse-CDF sampling with the draw 0.55: the first token whose running sum exceeds the draw.
    token = {dim: int((sums > 0.55).int().argmax()) for dim, sums in whole.items()}
    if rank == 0:
        print("torch", torch.__version__)
        print("expected from both:", [round(x, 2) for x in full.cumsum(-1)[0].tolist()], "token 2")
        for dim, sums in whole.items():
            print(f"seen: cumsum({dim})", [round(x, 2) for x in sums[0].tolist()], results[dim].placements, "token", token[dim])
    assert torch.allclose(whole[1], full.cumsum(1))
    assert torch.allclose(whole[-1], torch.tensor([[0.1, 0.3, 0.3, 0.7]])), "the behaviour has changed"
    assert token == {1: 2, -1: 3}
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=WORLD)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/demo.py" "$folder/meeting"

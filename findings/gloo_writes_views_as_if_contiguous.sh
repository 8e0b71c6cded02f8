#!/usr/bin/env bash
# Date:    2026-11-28
# Package: torch 2.13.0 (torch.distributed, gloo backend)
# Guess:   all_reduce and broadcast of a view (some columns of a matrix) work in place on the view's elements, or raise,
#          as send and all_to_all_single do ("Tensors must be contiguous").
# Seen:    both succeed. gloo takes the view's first address and writes numel() elements in a row: elements OUTSIDE
#          the view are changed, and the view's last elements are left as they were. A transposed matrix comes out right
#          (sums do not mind the order), and all_gather of the same view is right too, so small tests pass.
# Matters: tensor parallelism that reduces a slice of a fused buffer (or of a padded batch) gives wrong numbers in the
#          later rows and damages the neighbour's columns.
# Output:  all_reduce, rank 0: expected [[0,3,2,3],[12,15,6,7],[24,27,10,11]], seen [[0,3,6,9],[12,15,6,7],[8,9,10,11]]
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

WORLD = 2


def matrix(rank):
    return torch.arange(12.0).reshape(3, 4) * (rank + 1)


def work(rank, meeting_file):
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method=f"file://{meeting_file}")

    whole = matrix(rank)
    dist.all_reduce(whole[:, :2])  # the first two columns of each row
    right = matrix(rank)
    right[:, :2] = matrix(0)[:, :2] + matrix(1)[:, :2]

    copied = matrix(rank)
    dist.broadcast(copied[:, :2], src=0)
    right_copy_on_1 = matrix(1)
    right_copy_on_1[:, :2] = matrix(0)[:, :2]

    gathered = [torch.zeros(3, 2) for _ in range(WORLD)]
    dist.all_gather(gathered, matrix(rank)[:, :2])
    assert all(torch.equal(g, matrix(r)[:, :2]) for r, g in enumerate(gathered))

    try:
        dist.all_to_all_single(torch.zeros(4, 2), torch.zeros(4, 4)[:, :2])
        refused = "accepted"
    except ValueError as error:
        refused = str(error)

    on_rank_1 = [None] * WORLD
    dist.all_gather_object(on_rank_1, copied)
    if rank == 0:
        print("torch", torch.__version__)
        print(f"all_reduce of columns 0 and 1, rank 0\n expected {right.tolist()}\n seen     {whole.tolist()}")
        print(f"broadcast of columns 0 and 1 from rank 0, rank 1\n expected {right_copy_on_1.tolist()}")
        print(f" seen     {on_rank_1[1].tolist()}")
        print("all_to_all_single of such a view:", refused)
    assert torch.equal(whole[2], matrix(rank)[2]), "the last row was reduced: the behaviour has changed"
    assert not torch.equal(whole[:, 2:], right[:, 2:]), "only the view was written: the behaviour has changed"
    assert torch.equal(on_rank_1[1][2], matrix(1)[2]), "the last row was copied: the behaviour has changed"
    assert refused == "Tensors must be contiguous"
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=WORLD)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/demo.py" "$folder/meeting"

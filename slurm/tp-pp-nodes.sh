#!/bin/bash
# A model in two pipeline stages over the GPUs of several nodes, each split over half of them. For what fits no single node.
#   sbatch --nodes=2 slurm/tp-pp-nodes.sh /path/to/environment [MODEL] [more flags of `llama-fast bench`]
#SBATCH --job-name=llama-fast-tp-pp-nodes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=00:30:00
set -euo pipefail
environment=${1:?the path of a virtual environment in which llama-fast is installed, the same on every node}
model=${2:-random:llama-2-70b}
source "$environment/bin/activate"
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1  # multicast can put a shared host's GPUs out of service
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 20000))  # two jobs on one node do not meet
# One launcher on every node; --kill-on-bad-exit ends all when one fails.
srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-4}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="${nodes[0]}:$port" \
    -m llama_fast bench --model "$model" --rungs tp-pp --out "results/tp-pp-nodes-$SLURM_JOB_ID" "${@:3}"

#!/bin/bash
# A server of replicas on Ray Serve, one on all GPUs of each node: docs/serving.md. It runs until the job's time is up.
#   sbatch --nodes=2 slurm/replicas-tp-nodes.sh /path/to/environment [MODEL] [more arguments of `serve run`, as rows=32 fused=true]
# Every node answers at port 8000: to itself (ssh -L 8000:localhost:8000 NODE), or to all if LLAMA_FAST_API_KEY is set.
#SBATCH --job-name=llama-fast-replicas-tp-nodes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
set -euo pipefail
environment=${1:?the path of a virtual environment in which llama-fast[ray] is installed, the same on every node}
model=${2:-random:llama-2-70b}
source "$environment/bin/activate"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
gpus=${SLURM_GPUS_ON_NODE:-4}
port=$((20000 + SLURM_JOB_ID % 20000))  # two jobs on one node do not meet
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN  # without a token whoever reaches the port runs what he likes
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_USAGE_STATS_ENABLED=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
if [ -n "${LLAMA_FAST_API_KEY:-}" ]; then export RAY_SERVE_DEFAULT_HTTP_HOST=0.0.0.0; fi
# Ray starts itself on every node, the first of which starts the replicas, and stops everywhere.
srun --kill-on-bad-exit=1 ray symmetric-run --address "${nodes[0]}:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-gpus "$gpus" --num-cpus "${SLURM_CPUS_PER_TASK:-16}" \
    -- serve run llama_fast.serve.ray:app model="$model" device=cuda replicas="$SLURM_JOB_NUM_NODES" ranks="$gpus" "${@:3}"

#!/bin/bash
# A model in two pipeline stages, each split over half the GPUs of a node.
#   sbatch slurm/tp-pp.sh /path/to/environment [MODEL] [more flags of `llama-fast bench`]
#SBATCH --job-name=llama-fast-tp-pp
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=00:30:00
set -euo pipefail
environment=${1:?the path of a virtual environment in which llama-fast is installed}
model=${2:-random:llama-2-70b}
source "$environment/bin/activate"
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1  # multicast can put a shared host's GPUs out of service
llama-fast bench --model "$model" --rungs tp-pp --out "results/tp-pp-${SLURM_JOB_ID:-local}" "${@:3}"

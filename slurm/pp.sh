#!/bin/bash
# A model in pipeline stages, one on each GPU of a node: many texts gain by it, one does not.
#   sbatch slurm/pp.sh /path/to/environment [MODEL] [more flags of `llama-fast bench`]
#SBATCH --job-name=llama-fast-pp
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
llama-fast bench --model "$model" --rungs pp --out "results/pp-${SLURM_JOB_ID:-local}" "${@:3}"

#!/bin/bash
# An int4 draft proposes, the model checks, both by our own kernels.
#   sbatch slurm/speculative.sh /path/to/environment [MODEL] [more flags of `llama-fast bench`]
#SBATCH --job-name=llama-fast-fused-speculative-int4
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=00:30:00
set -euo pipefail
environment=${1:?the path of a virtual environment in which llama-fast is installed}
model=${2:-random:llama-2-7b}
source "$environment/bin/activate"
llama-fast bench --model "$model" --rungs fused-speculative-int4 --out "results/fused-speculative-int4-${SLURM_JOB_ID:-local}" "${@:3}"

#!/bin/bash
# The same with fp8 weights.
#   sbatch slurm/fused-fp8.sh /path/to/environment [MODEL] [more flags of `llama-fast bench`]
#SBATCH --job-name=llama-fast-fused-fp8
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=00:30:00
set -euo pipefail
environment=${1:?the path of a virtual environment in which llama-fast is installed}
model=${2:-random:llama-2-7b}
source "$environment/bin/activate"
llama-fast bench --model "$model" --rungs fused-fp8 --out "results/fused-fp8-${SLURM_JOB_ID:-local}" "${@:3}"

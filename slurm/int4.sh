#!/bin/bash
# The same with int4 weights.
#   sbatch slurm/int4.sh /path/to/environment [MODEL] [more flags of `llama-fast bench`]
#SBATCH --job-name=llama-fast-int4
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=00:30:00
set -euo pipefail
environment=${1:?the path of a virtual environment in which llama-fast is installed}
model=${2:-smollm2-135m}
source "$environment/bin/activate"
llama-fast bench --model "$model" --rungs int4 --out "results/int4-${SLURM_JOB_ID:-local}" "${@:3}" --device cpu

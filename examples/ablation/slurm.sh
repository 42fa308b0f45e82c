#!/bin/bash
# A grid that outgrows one machine, as a Slurm job array: one task, one run. Slurm is the scheduler; there is none here.
#
#     gradsurgery ablate --config examples/ablation/grid_a22.yaml --list            # how many runs there are: --array below
#     sbatch examples/ablation/slurm.sh examples/ablation/grid_a22.yaml FOLDER runs/grid_a22
#     gradsurgery ablate --config examples/ablation/grid_a22.yaml --tofu-dir FOLDER --output runs/grid_a22   # what failed, and the table
#
# Every task writes runs/<id>.json in the shared output folder and does nothing if it is there, so the same sbatch goes on after a failure.
# Start models are cached in XDG_CACHE_HOME, which must be shared too; do --index 0 for each model seed first, or several tasks train the same one.
#SBATCH --job-name=ablate
#SBATCH --array=0-143
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=00:30:00
#SBATCH --output=ablate-%A_%a.log
# For a model that wants one: #SBATCH --gpus=1

set -eu
exec gradsurgery ablate --config "$1" --tofu-dir "$2" --output "$3" --index "$SLURM_ARRAY_TASK_ID"

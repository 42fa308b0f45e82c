#!/bin/bash
# A grid that outgrows one machine, as a Slurm job array: one task, one run. Slurm is the scheduler; there is none here.
#
#     sbatch examples/ablation/slurm.sh examples/ablation/grid_a22.yaml FOLDER runs/grid_a22
#     gradsurgery ablate --config examples/ablation/grid_a22.yaml --tofu-dir FOLDER --output runs/grid_a22   # what failed, and the table
#
# The array below has a task for every run of grid_a22.yaml. For another grid --array=0-9 may have any end: task i of n does the runs i, i + n,
# i + 2n and so on, so that together they do all of them; mind the time that a task then needs. --array=5,17, which does not begin at 0, does
# these two runs only.
#
# Every run writes runs/<id>.json in the shared output folder and does nothing if it is there, so the same sbatch goes on after a failure.
# Start models are cached in XDG_CACHE_HOME, which must be shared too; do the first run of each model seed in `--list` first (here --index 0 and 90), or several tasks train the same one.
#SBATCH --job-name=ablate
#SBATCH --array=0-179
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=00:30:00
#SBATCH --output=ablate-%A_%a.log
# For a model that wants one: #SBATCH --gpus=1

set -eu
listed=$(gradsurgery ablate --config "$1" --list) # an index and an id a line
runs=$(grep -c . <<<"$listed")
stride=$runs failed=0
[ "$SLURM_ARRAY_TASK_MIN" -eq 0 ] && [ "$((SLURM_ARRAY_TASK_MAX + 1))" -eq "$SLURM_ARRAY_TASK_COUNT" ] && stride=$SLURM_ARRAY_TASK_COUNT
for ((index = SLURM_ARRAY_TASK_ID; index < runs; index += stride)); do
    gradsurgery ablate --config "$1" --tofu-dir "$2" --output "$3" --index "$index" || failed=1
done
exit "$failed"

#!/bin/bash
# One command over two machines with two GPUs each, started by Slurm. Copy it and change the two counts.
#
#     sbatch examples/slurm.sh --model PATH --forget forget.json --retain retain.json --output /shared/runs/four
#
# Every task holds the whole model (DDP). A model that one GPU cannot hold is sharded over all of them:
#
#     sbatch --export=ALL,STRATEGY=fsdp2 examples/slurm.sh --model PATH ...
#
# The folder of --output, and XDG_CACHE_HOME and HF_HOME if they are set, must be shared by the machines. A step takes
# --batch-size pairs on every GPU. Lightning reads its place from Slurm's variables, except in a job called bash.
#SBATCH --job-name=unlearn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=unlearn-%j.log
set -eu

exec srun gradsurgery unlearn \
    --devices "$SLURM_NTASKS_PER_NODE" --num-nodes "$SLURM_NNODES" --strategy "${STRATEGY:-ddp}" \
    "$@"

#!/bin/bash
# One command over several devices, started by torchrun. Copy it and change what you need.
#
#     bash examples/torchrun.sh --model PATH --forget forget.json --retain retain.json --output runs/two
#
# Two GPUs of one machine, each with the whole model (DDP). A model that one GPU cannot hold is sharded over them:
#
#     STRATEGY=fsdp2 bash examples/torchrun.sh --model PATH ...
#
# Two machines with two GPUs each: the same on both, with MACHINE=0 on the first and MACHINE=1 on the second. The folder
# of --output must be shared by both.
#
#     MACHINES=2 MACHINE=0 FIRST_MACHINE=10.0.0.1 bash examples/torchrun.sh --model PATH ...
#
# A step takes --batch-size pairs on every device: with twice the devices give half of it for the same result.
set -eu
DEVICES=${DEVICES:-2} MACHINES=${MACHINES:-1}

exec torchrun \
    --nnodes "$MACHINES" --nproc-per-node "$DEVICES" --node-rank "${MACHINE:-0}" \
    --master-addr "${FIRST_MACHINE:-localhost}" --master-port "${PORT:-29500}" \
    -m lightning_modules.cli unlearn \
    --devices "$DEVICES" --num-nodes "$MACHINES" --strategy "${STRATEGY:-ddp}" \
    "$@"

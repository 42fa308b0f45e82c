#!/bin/bash
# EleutherAI's lm-evaluation-harness scores a model that gradsurgery saved; nothing is converted or changed first.
#
#     pip install lm-eval
#     gradsurgery unlearn --model HuggingFaceTB/SmolLM2-135M-Instruct --wmdp cyber --output runs/wmdp
#     bash examples/lm_eval.sh runs/wmdp wmdp_cyber,mmlu --batch_size 8
#
# The scores of wmdp_cyber, wmdp_bio and mmlu are those of metrics.json's "benchmarks" where all questions were scored
# (--evaluation-examples 20000). What follows the two arguments is passed on to lm_eval. Of an adapter that was kept
# apart (--save adapter) give the model that it is for too:
#
#     BASE=HuggingFaceTB/SmolLM2-135M-Instruct bash examples/lm_eval.sh runs/wmdp wmdp_cyber
set -eu
RUN=$1 TASKS=$2
shift 2

MODEL=pretrained=$RUN/model
if [ -n "${BASE:-}" ]; then MODEL=pretrained=$BASE,peft=$RUN/model; fi

exec lm_eval --model hf --model_args "$MODEL,dtype=float32" --tasks "$TASKS" --output_path "$RUN/lm_eval" "$@"

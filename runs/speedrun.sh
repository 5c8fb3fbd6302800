#!/usr/bin/env bash
# From nothing to the CORE of GPT-2 on one node of 8 GPUs: data, tokenizer, training, evaluation.
#   bash runs/speedrun.sh [tokens per scaling parameter] [wandb name] [seed]     the ratio of upstream's record is 8
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

RATIO="${1:-8}"
RUN="${2:-dummy}"
SEED="${3:-42}"
BASE="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
export OMP_NUM_THREADS=1

python -m nanochat.dataset --dataset climbmix -n 170 -w 16
[ -d "$BASE/eval_bundle" ] || python -m nanochat.core_eval
[ -d "$BASE/tokenizer" ] || python -m scripts.tok_train --dataset climbmix --vocab-size 32768
python -m scripts.tok_eval --dataset climbmix

torchrun --standalone --nproc-per-node=8 -m scripts.base_train --dataset climbmix --run "$RUN" --seed "$SEED" \
    --model-tag "speedrun_s$SEED" --depth 24 --target-param-data-ratio "$RATIO" --device-batch-size 16 --core-metric-max-per-task -1 \
    --target-metric-name core --target-metric-threshold 0.256525
torchrun --standalone --nproc-per-node=8 -m scripts.base_eval --dataset climbmix --model-tag "speedrun_s$SEED" \
    --eval core,bpb,sample

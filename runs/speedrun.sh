#!/usr/bin/env bash
# Train to the CORE of GPT-2 on one node: download the data, train a tokenizer and the model,
# evaluate it, and print its metrics. The recipe is that of a record of
# karpathy/nanochat (depth 24, fp8, ratio 8). The device batch size is the largest one that fits
# according to scripts.plan.
#   bash runs/speedrun.sh [ratio or infer.json] [wandb name] [seed]   repeat the command to continue
# The ratio is that of training tokens to scaling parameters; infer.json is a result of lane B.
# GPU=h200 GPUS=4: hardware of the node (h100, 8). TAG=_2: a second run with the same seed.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

RATIO="${1:-8}" WANDB="${2:-dummy}" SEED="${3:-42}" GPU="${GPU:-h100}" GPUS="${GPUS:-8}"
BASE="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
BASE="${BASE/#\~/$HOME}" # the programs expand a leading ~, too
RUN="speedrun_s$SEED${TAG:-}"
DONE="$BASE/stages/$RUN"
mkdir -p "$DONE"
export OMP_NUM_THREADS=1

stage() {  # stage NAME COMMAND...: run the command unless it succeeded in an earlier call
    [ -e "$DONE/$1" ] || { "${@:2}" && touch "$DONE/$1"; }
}

HORIZON="--target-param-data-ratio=$RATIO"
case "$RATIO" in *.json) HORIZON="--inference-json=$RATIO" ;; esac
FLAGS="$(python -m scripts.plan --gpu "$GPU" --gpus "$GPUS" --depth=24 --fp8 "$HORIZON" --as-flags)"
[ -e "$DONE/flags" ] || echo "$FLAGS" > "$DONE/flags"
[ "$FLAGS" = "$(cat "$DONE/flags")" ] || {
    echo "error: $RUN was started with $(cat "$DONE/flags"), now the flags are $FLAGS; give the" \
        "same arguments or TAG=_2" >&2; exit 2; }

stage data python -m nanochat.dataset --dataset climbmix -n 170 -w 16
stage core python -m nanochat.core_eval
[ -d "$BASE/tokenizer" ] || python -m scripts.tok_train --dataset climbmix --vocab-size 32768
stage tok_eval python -m scripts.tok_eval --dataset climbmix
# shellcheck disable=SC2086  (the flags must be split into words)
stage train torchrun --standalone --nproc-per-node="$GPUS" -m scripts.base_train \
    --dataset climbmix --run "$WANDB" --seed "$SEED" --run-id "$RUN" --model-tag "$RUN" $FLAGS \
    --core-metric-max-per-task -1 --save-minutes 10 --keep-checkpoints 2 --resume-from-step auto \
    --target-metric-name core --target-metric-threshold 0.256525
stage eval torchrun --standalone --nproc-per-node="$GPUS" -m scripts.base_eval \
    --dataset climbmix --model-tag "$RUN" --eval core,bpb,sample
python -m scripts.runs --compare "$RUN"

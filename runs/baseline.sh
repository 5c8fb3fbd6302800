#!/usr/bin/env bash
# The baseline protocol, without a target: its ends give the other experiments their threshold. TAG=... is added to the
# experiment's name (in the other scripts too): a repetition beside rows that the ledger has already.
#   bash runs/baseline.sh [cpu | cpu-short | d12] ["seeds"]      e.g. bash runs/baseline.sh d12 "0 1 2"
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

PROFILE="${1:-cpu}"
SEEDS="${2:-0 1}"
case "$PROFILE" in
    cpu*) DATASET=stdlib FILES="" VOCABULARY=8192 ;;
    *) DATASET=climbmix FILES="-n 8" VOCABULARY=32768 ;;
esac
TOKENIZER="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/tokenizer_$DATASET"

# shellcheck disable=SC2086  (files and seeds are words)
python -m nanochat.dataset --dataset "$DATASET" $FILES
[ -d "$TOKENIZER" ] || python -m scripts.tok_train --dataset "$DATASET" --vocab-size "$VOCABULARY" \
    --tokenizer-dir "$TOKENIZER"

python -m scripts.experiment --name "baseline_$PROFILE${TAG:-}" --profile "$PROFILE" --candidates baseline --seeds $SEEDS \
    -- --tokenizer-dir "$TOKENIZER"

#!/usr/bin/env bash
# Candidates against the baseline over depths, one seed: what gate 4 judges by. Run runs/baseline.sh first.
#   bash runs/miniseries.sh [cpu | cpu-short | d12] ["candidates"] ["depths"]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

PROFILE="${1:-cpu}"
CANDIDATES="${2:-fused-rmsnorm chunked-ce both}"
case "$PROFILE" in
    cpu*) DATASET=stdlib SERIES="$PROFILE" DEPTHS="${3:-2 3 4}" ;;
    *) DATASET=climbmix SERIES=miniseries DEPTHS="${3:-8 10 12 14}" ;;
esac
TOKENIZER="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/tokenizer_$DATASET"

# lane C's kernels run in the Triton interpreter where there is no GPU
[[ "$PROFILE" != cpu* ]] || export TRITON_INTERPRET=1

# shellcheck disable=SC2086  (candidates and depths are words)
python -m scripts.experiment --name "miniseries_$PROFILE${TAG:-}" --profile "$SERIES" --seeds 0 \
    --candidates baseline $CANDIDATES --depths $DEPTHS -- --tokenizer-dir "$TOKENIZER"

#!/usr/bin/env bash
# Train the baseline protocol without a target; its final losses give other experiments theirs.
#   bash runs/baseline.sh [cpu | cpu-short | d12] ["seeds"]      for example: d12 "0 1 2"
# TAG=_2 adds to the experiment's name (in all scripts here): a repetition beside existing rows.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

# shellcheck disable=SC2086  (the seeds are words)
python -m scripts.experiment --name "baseline_${1:-cpu}${TAG:-}" --profile "${1:-cpu}" \
    --seeds ${2:-0 1}

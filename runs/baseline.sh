#!/usr/bin/env bash
# Train the baseline of a protocol without a target. Its losses are the target of other experiments
# (scripts.experiment --target-from).
#   bash runs/baseline.sh [cpu | cpu-short | d12-protocol] ["seeds"]
# For example: d12-protocol "0 1 2".
# TAG=_2 appends _2 to the experiment's name, to repeat an experiment that has records.
# This applies to all scripts in this folder that run experiments.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

# shellcheck disable=SC2086  (the seeds must be split into words)
python -m scripts.experiment --name "baseline_${1:-cpu}${TAG:-}" --profile "${1:-cpu}" \
    --seeds ${2:-0 1}

#!/usr/bin/env bash
# The baseline protocol, without a target: its ends give the other experiments their threshold. TAG=... is added to the
# experiment's name (in the other scripts too): a repetition beside rows that the ledger has already.
#   bash runs/baseline.sh [cpu | cpu-short | d12] ["seeds"]      e.g. bash runs/baseline.sh d12 "0 1 2"
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

# shellcheck disable=SC2086  (the seeds are words)
python -m scripts.experiment --name "baseline_${1:-cpu}${TAG:-}" --profile "${1:-cpu}" --seeds ${2:-0 1}

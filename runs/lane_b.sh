#!/usr/bin/env bash
# Lane B from the corpus to a verdict: target, calibration, statistics, inference, then the baseline
# against the inferred ratio and one neighbour.
#   bash runs/lane_b.sh [cpu | d12] ["seeds"]      repeat the command to continue
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

# shellcheck disable=SC2086  (the seeds are words)
python -m scripts.lane_b --name "lane_b_${1:-cpu}${TAG:-}" --profile "${1:-cpu}" --seeds ${2:-0 1 2}

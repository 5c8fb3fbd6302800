#!/usr/bin/env bash
# Lane B from corpus to verdict: target, calibration, statistics, inference, the baseline beside the inferred ratio and
# its one neighbour, rows, who won.   bash runs/lane_b.sh [cpu | d12] ["seeds"]     stop it at any time; it goes on
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

# shellcheck disable=SC2086  (the seeds are words)
python -m scripts.lane_b --name "lane_b_${1:-cpu}${TAG:-}" --profile "${1:-cpu}" --seeds ${2:-0 1 2}

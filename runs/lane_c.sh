#!/usr/bin/env bash
# Lane C from baseline to verdict: baseline, fused-rmsnorm, chunked-ce and both, then the miniseries, gates, report.
#   bash runs/lane_c.sh [cpu-short | cpu | d12] ["seeds"]      stop it at any time; the same command goes on
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

PROFILE="${1:-cpu-short}"
SEEDS="${2:-0 1}"
NAME="$PROFILE${TAG:-}"
bash runs/baseline.sh "$PROFILE" "$SEEDS"

# lane C's kernels run in the Triton interpreter where there is no GPU
[[ "$PROFILE" != cpu* ]] || export TRITON_INTERPRET=1

# shellcheck disable=SC2086  (the seeds are words)
python -m scripts.experiment --name "lane_c_$NAME" --profile "$PROFILE" --seeds $SEEDS \
    --candidates baseline fused-rmsnorm chunked-ce both --target-from "baseline_$NAME" --probe
bash runs/miniseries.sh "$PROFILE"

python -m scripts.verdict --experiment "lane_c_$NAME" --miniseries "miniseries_$NAME"
python -m scripts.report --experiment "lane_c_$NAME" --miniseries "miniseries_$NAME" \
    --out "dev/reports/lane_c_$NAME.html"

#!/usr/bin/env bash
# Run lane C up to a verdict: train the baseline, fused-rmsnorm, chunked-ce and both at one depth,
# then at several depths (miniseries), print the verdict of the gates, and write a report to out/.
#   bash runs/lane_c.sh [cpu-short | cpu | d12-protocol] ["seeds"]   repeat the command to continue
# cpu-short is a smoke test: it shows that the programs work and gives no verdict.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

PROFILE="${1:-cpu-short}"
SEEDS="${2:-0 1}"
NAME="$PROFILE${TAG:-}"
bash runs/baseline.sh "$PROFILE" "$SEEDS"

# without a GPU, the Triton kernels run in the interpreter
[[ "$PROFILE" != cpu* ]] || export TRITON_INTERPRET=1

# shellcheck disable=SC2086  (the seeds must be split into words)
python -m scripts.experiment --name "lane_c_$NAME" --profile "$PROFILE" --seeds $SEEDS \
    --candidates baseline fused-rmsnorm chunked-ce both --target-from "baseline_$NAME" --probe
bash runs/miniseries.sh "$PROFILE"

python -m scripts.verdict --experiment "lane_c_$NAME" --miniseries "miniseries_$NAME"
mkdir -p out
python -m scripts.report --experiment "lane_c_$NAME" --miniseries "miniseries_$NAME" \
    --out "out/lane_c_$NAME.html"

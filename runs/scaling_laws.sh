#!/usr/bin/env bash
# Train iso-FLOP curves: several depths per compute budget; the lowest val_bpb shows the best size.
# The 40 shards hold about 2.4B tokens; longer runs read them repeatedly and print that (d8 at 1e19
# FLOPs needs 34B tokens). The reports are written to out/.
#   bash runs/scaling_laws.sh ["budgets in FLOPs"] ["depths"] [processes per node]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

python -m nanochat.dataset --dataset climbmix --num-files 40
mkdir -p out

# shellcheck disable=SC2086  (the depths must be split into words)
for FLOPS in ${1:-1e18 3e18 1e19}; do
    python -m scripts.experiment --name "scaling_$FLOPS${TAG:-}" --profile miniseries --seeds 0 \
        --depths ${2:-8 10 12 14 16 18} --nproc-per-node "${3:-1}" -- \
        --target-flops="$FLOPS" --device-batch-size=16 --allow-repeats
    python -m scripts.report --experiment "scaling_$FLOPS${TAG:-}" \
        --out "out/scaling_$FLOPS${TAG:-}.html"
done

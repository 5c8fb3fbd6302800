#!/usr/bin/env bash
# Lane B: train a few small models on a text; name the depth and ratio that reach a target first.
#   bash runs/lane_b.sh TARGET [DATASET] [flags of scripts.lane_b]      repeat it to continue
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

TARGET="${1:?give the target val_bpb, for example 1.62}"
DATASET="${2:-stdlib}"
python -m scripts.lane_b --name "lane_b${TAG:-}" --target-metric-threshold "$TARGET" \
    --dataset "$DATASET" "${@:3}"

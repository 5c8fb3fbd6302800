#!/usr/bin/env bash
# Candidates against the baseline over depths, one seed: what gate 4 judges by.
#   bash runs/miniseries.sh [cpu | cpu-short | d12] ["candidates"] ["depths"]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

PROFILE="${1:-cpu}"
# lane C's kernels run in the Triton interpreter where there is no GPU
[[ "$PROFILE" != cpu* ]] || export TRITON_INTERPRET=1

# shellcheck disable=SC2086  (candidates and depths are words)
python -m scripts.experiment --name "miniseries_$PROFILE${TAG:-}" --profile "$PROFILE" --series --seeds 0 \
    --candidates baseline ${2:-fused-rmsnorm chunked-ce both} ${3:+--depths $3}

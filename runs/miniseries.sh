#!/usr/bin/env bash
# Train candidates and baseline over depths with one seed, for gate 4.
#   bash runs/miniseries.sh [cpu | cpu-short | d12] ["candidates"] ["depths"]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

PROFILE="${1:-cpu}"
# the Triton kernels run in the interpreter on a machine without a GPU
[[ "$PROFILE" != cpu* ]] || export TRITON_INTERPRET=1

# shellcheck disable=SC2086  (candidates and depths are words)
python -m scripts.experiment --name "miniseries_$PROFILE${TAG:-}" --profile "$PROFILE" --series \
    --seeds 0 --candidates baseline ${2:-fused-rmsnorm chunked-ce both} ${3:+--depths $3}

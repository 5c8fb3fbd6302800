#!/usr/bin/env bash
# Train the baseline and the candidates at several depths with one seed, for gate 4.
#   bash runs/miniseries.sh [cpu | cpu-short | d12] ["candidates"] ["depths"]
# For example: d12 "chunked-ce" "8 10 12". Defaults: all kernels, depths of the protocol.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

PROFILE="${1:-cpu}"
# without a GPU, the Triton kernels run in the interpreter
[[ "$PROFILE" != cpu* ]] || export TRITON_INTERPRET=1

# shellcheck disable=SC2086  (candidates and depths must be split into words)
python -m scripts.experiment --name "miniseries_$PROFILE${TAG:-}" --profile "$PROFILE" --series \
    --seeds 0 --candidates baseline ${2:-fused-rmsnorm chunked-ce both} ${3:+--depths $3}

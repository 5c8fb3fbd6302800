#!/usr/bin/env bash
# Train the baseline and the candidates at several depths with one seed, for gate 4.
#   bash runs/miniseries.sh [cpu | cpu-short | d12-protocol] ["candidates"] ["depths"]
# For example: d12-protocol "chunked-ce" "8 10 12". Default: all kernels, 3 depths on a CPU, else 4.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

PROFILE="${1:-cpu}"
SERIES=miniseries DEPTHS="8 10 12 14"
if [[ "$PROFILE" == cpu* ]]; then
    export TRITON_INTERPRET=1 # without a GPU, the Triton kernels run in the interpreter
    SERIES="$PROFILE" DEPTHS="2 3 4"
fi

# shellcheck disable=SC2086  (candidates and depths must be split into words)
python -m scripts.experiment --name "miniseries_$PROFILE${TAG:-}" --profile "$SERIES" --seeds 0 \
    --candidates baseline ${2:-fused-rmsnorm chunked-ce both} --depths ${3:-$DEPTHS}

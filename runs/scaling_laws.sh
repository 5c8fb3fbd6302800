#!/usr/bin/env bash
# Iso-FLOP curves: several depths at each compute budget; the lowest val_bpb of a budget tells its best size.
#   bash runs/scaling_laws.sh ["budgets in FLOPs"] ["depths"] [processes per node]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

BUDGETS="${1:-1e18 3e18 1e19}"
DEPTHS="${2:-8 10 12 14 16 18}"
RANKS="${3:-1}"
TOKENIZER="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/tokenizer_climbmix"

python -m nanochat.dataset --dataset climbmix --num-files 40
[ -d "$TOKENIZER" ] || python -m scripts.tok_train --dataset climbmix --vocab-size 32768 --tokenizer-dir "$TOKENIZER"

# shellcheck disable=SC2086  (the depths are words)
for FLOPS in $BUDGETS; do
    python -m scripts.experiment --name "scaling_$FLOPS" --profile miniseries --candidates baseline --seeds 0 \
        --depths $DEPTHS --nproc-per-node "$RANKS" \
        -- --target-flops "$FLOPS" --tokenizer-dir "$TOKENIZER"
    python -m scripts.report --experiment "scaling_$FLOPS" --out "dev/reports/scaling_$FLOPS.html"
done

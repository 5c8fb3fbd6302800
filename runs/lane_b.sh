#!/usr/bin/env bash
# Lane B from corpus to verdict: baseline -> threshold, calibration, statistics, inference, the inferred ratio and its
# one neighbour, rows, who won.   bash runs/lane_b.sh [cpu | d12] ["seeds"]     stop it at any time; it goes on
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

PROFILE="${1:-cpu}" SEEDS="${2:-0 1}" NAME="lane_b_${1:-cpu}${TAG:-}"
case "$PROFILE" in
    cpu) DATASET=stdlib FILES="" VOCABULARY=8192 DEPTH=2 STEPS=960 CONTEXT=256 FLAGS="--warmup-steps 10 --eval-every 60" ;;
    *) DATASET=climbmix FILES="-n 8" VOCABULARY=32768 DEPTH=12 STEPS=1500 CONTEXT=512 FLAGS="" ;;
esac
BASE="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}" TOKENIZER="$BASE/tokenizer_$DATASET" OUT="$BASE/$NAME"
mkdir -p "$OUT"
# shellcheck disable=SC2086,SC2046  (seeds, flags and run ids are words)
train() { python -m scripts.experiment --profile "$PROFILE" --depths $DEPTH --seeds $SEEDS "$@" \
    -- --tokenizer-dir "$TOKENIZER" --num-iterations $STEPS $FLAGS; }
horizon() { echo "h$1=--num-iterations $((STEPS / $1)) --position-losses"; }
inferred() { python -c "import json; print(json.load(open('$OUT/infer.json'))['$1'])"; }
ratio() { echo "$1=--num-iterations -1 --target-param-data-ratio $(inferred "$2")"; }
runs() { for name in "${@:2}"; do for seed in $SEEDS; do echo "$1.$name.d$DEPTH.s$seed"; done; done; }

python -m nanochat.dataset --dataset "$DATASET" $FILES
[ -d "$TOKENIZER" ] || python -m scripts.tok_train --dataset "$DATASET" --vocab-size "$VOCABULARY" --tokenizer-dir "$TOKENIZER"
train --name "${NAME}_baseline" --candidates baseline
train --name "${NAME}_calibration" --candidates "$(horizon 16)" "$(horizon 8)" "$(horizon 4)" "$(horizon 2)"
[ -f "$OUT/stats.json" ] || python -m scripts.lane_b_stats --dataset "$DATASET" --tokenizer "$TOKENIZER" \
    --context-tokens $CONTEXT --position-losses $(runs "${NAME}_calibration" h4 h2) --output-json "$OUT/stats.json" --plot "$OUT/stats.png"
python -m scripts.lane_b_infer_ratio --stats-json "$OUT/stats.json" --calibration-run $(runs "${NAME}_calibration" h16 h8 h4 h2) \
    --baseline-run $(runs "${NAME}_baseline" baseline) --output-json "$OUT/infer.json" --plot "$OUT/infer.png"
train --name "$NAME" --target-metric-threshold "$(inferred target_metric_threshold)" \
    --candidates baseline "$(ratio inferred chosen_ratio)" "$(ratio confirmation confirmation_ratio)"
for decision in inferred confirmation; do python -m scripts.lane_b_log_run --inference-json "$OUT/infer.json" \
    --decision $decision --skip-logged --run $(runs "$NAME" $decision); done
python -m scripts.report --experiment "$NAME" --lane-b-figures "$OUT"/*.png --out "dev/reports/$NAME.html"
python -m scripts.lane_b_log_run --standing --inference-json "$OUT/infer.json" --baseline-run $(runs "$NAME" baseline)

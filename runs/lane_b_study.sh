#!/usr/bin/env bash
# The study of lane B on two CPU cores; repeat the command to continue. Predictions are written to
# dev/lane_b_study.csv and must be committed before the target runs start.
#   TEXTS=FOLDER bash runs/lane_b_study.sh
# FOLDER: the folders narrative, dialogue and code, each a text for scripts.base_train.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

export TEXTS="${TEXTS:?give the folder of the texts}" OMP_NUM_THREADS=1
TABLE=dev/lane_b_study.csv

train() {  # train the runs that python -m dev.lane_b_study prints, two at a time
    python -m dev.lane_b_study commands "$@" | xargs -r -P 2 -L 1 python -m scripts.base_train
}

for text in narrative dialogue code; do
    [ -d "$TEXTS/tok/$text" ] || python -m scripts.tok_train --dataset "$TEXTS/$text" \
        --vocab-size 2048 --tokenizer-dir "$TEXTS/tok/$text"
done
train calibration
python -m dev.lane_b_study predict "$TABLE"
if ! git diff --quiet -- "$TABLE"; then
    echo "commit the predictions in $TABLE, then repeat the command" && exit 0
fi
train targets "$TABLE"
python -m dev.lane_b_study measure "$TABLE"

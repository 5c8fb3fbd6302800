#!/usr/bin/env bash
# The study of lane B: what it names in each cell, tried, and its page.   bash runs/lane_b_study.sh BOOKS [cells]
# BOOKS: folder of parquet shards of English text. Stop it at any time; the same command goes on. Cells that are in
# dev/lane_b_study.csv are not run again: to repeat them, move it and dev/lane_b_study_predictions.csv away first.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d "${1:-}" ] || { echo "error: give a folder of parquet shards of English text: bash $0 BOOKS" >&2; exit 2; }
BOOKS="$(realpath "$1")"
source runs/setup.sh

WORK="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/lane_b_study"
python -m dev.study.lane_b_cells --books "$BOOKS" --work "$WORK" ${2:+--cells "${@:2}"}
python -m dev.study.lane_b_results

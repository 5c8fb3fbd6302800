#!/usr/bin/env bash
# Install the project, then train a small model on Python's standard library, which needs no
# download.
#   bash runs/quickstart.sh
# The learning rates are 16 times the defaults: base_train scales them by (batch / 524,288)^0.5,
# which is 1/16 at 2,048 tokens per step, and the unscaled rates were much better (dev/LOG.md).
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

BASE="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
BASE="${BASE/#\~/$HOME}" # the programs expand a leading ~, too
TOKENIZER="$BASE/tokenizer_stdlib"

python -m nanochat.dataset --dataset stdlib
python -m scripts.tok_train --dataset stdlib --vocab-size 8192 --tokenizer-dir "$TOKENIZER"
python -m scripts.base_train --dataset stdlib --tokenizer-dir "$TOKENIZER" --model-tag quickstart \
    --depth 4 --head-dim 64 --max-seq-len 256 --window-pattern L --device-batch-size 8 \
    --total-batch-size 2048 \
    --matrix-lr 0.32 --embedding-lr 4.8 --unembedding-lr 0.128 \
    --num-iterations 500 --eval-every 250 --eval-tokens 1000000 --core-metric-every -1 \
    --sample-every 500

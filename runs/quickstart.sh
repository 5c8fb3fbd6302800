#!/usr/bin/env bash
# Install the project, then train a small model on Python's standard library, which needs no
# download.
#   bash runs/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

BASE="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
BASE="${BASE/#\~/$HOME}" # the programs expand a leading ~, too
TOKENIZER="$BASE/tokenizer_stdlib"

python -m nanochat.dataset --dataset stdlib
python -m scripts.tok_train --dataset stdlib --vocab-size 8192 --tokenizer-dir "$TOKENIZER"
python -m scripts.base_train --dataset stdlib --tokenizer-dir "$TOKENIZER" --model-tag quickstart \
    --preset laptop --num-iterations 500

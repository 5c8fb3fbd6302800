#!/usr/bin/env bash
# All set-up, then lint and tests.   bash runs/test.sh [pytest's arguments]     e.g. bash runs/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

ruff check .
python -m pytest -n 2 "$@"

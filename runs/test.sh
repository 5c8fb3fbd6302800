#!/usr/bin/env bash
# Install the project, then run ruff and the tests.
#   bash runs/test.sh [arguments of pytest]      for example: -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

ruff check .
python -m pytest -n 2 "$@"

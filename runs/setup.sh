#!/usr/bin/env bash
# Install this project and its packages in .venv, unless that is up to date, and activate it.
# The other scripts source this file. To run it alone:
#   bash runs/setup.sh && source .venv/bin/activate
# PYTHON: interpreter, 3.10 to 3.13 (python3). EXTRAS: extras of pyproject.toml (dev,report).
[ "${BASH_SOURCE[0]}" != "$0" ] || { set -e; cd "$(dirname "$0")/.."; }
PYTHON="${PYTHON:-python3}"
EXTRAS="${EXTRAS:-dev,report}"
WANTED="$EXTRAS $(cksum < pyproject.toml)"
if [ "$(cat .venv/.installed 2>/dev/null)" != "$WANTED" ]; then
    "$PYTHON" -c 'import sys; v = sys.version_info[:2]; v >= (3, 10) or sys.exit(
        f"error: Python {v[0]}.{v[1]} is too old; install 3.10 to 3.13 and run again, for example "
        "with PYTHON=python3.11")'
    echo "setting up .venv (a few minutes the first time) ..."
    "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$EXTRAS]"
    echo "$WANTED" > .venv/.installed
fi
source .venv/bin/activate

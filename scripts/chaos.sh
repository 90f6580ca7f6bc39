#!/usr/bin/env bash
# The fault campaign: stops, kills, flipped bits, NaN, a full disk, dead and hung ranks; a table at the end.
#   bash scripts/chaos.sh [--short] [--seed N] [--only NAME …] [--table FILE]
# Bounded in time: an hour for all of it. Exit code 0 when everything was as promised.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
exec timeout 3600 "$python" tests/chaos.py "$@"

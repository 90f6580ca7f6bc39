#!/usr/bin/env bash
# Sets up, checks the style, runs the tests. Arguments go to pytest: bash scripts/test.sh tests/engine -k resume

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh --dev

case "$(nvidia-smi -L 2>/dev/null || true)" in
    *GPU*) ;;
    *) export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" ;;
esac
export HF_HUB_OFFLINE=1 # no test may need the network
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

.venv/bin/python -m ruff check --quiet
.venv/bin/python -m ruff format --check --quiet
.venv/bin/python -m mypy --no-error-summary
exec .venv/bin/python -m pytest "$@"

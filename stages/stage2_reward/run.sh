#!/usr/bin/env bash
# Stage 2: the reward model, from preferences.
#   bash stages/stage2_reward/run.sh [--config FILE] [--print-config] [key.path=value …]
# NPROC, NNODES, NODE_RANK and MASTER_ADDR come from the environment; by default one process a GPU, or one on CPU.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m agrpo.launch stages/stage2_reward/main.py "$@"

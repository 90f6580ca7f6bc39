#!/usr/bin/env bash
# Stage 1: supervised fine-tuning.
#   bash stages/stage1_sft/run.sh [--config FILE] [--print-config] [key.path=value …]
# NPROC, NNODES, NODE_RANK and MASTER_ADDR come from the environment; by default one process a GPU, or one on CPU.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m agrpo.launch stages/stage1_sft/main.py "$@"

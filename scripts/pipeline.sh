#!/usr/bin/env bash
# The stages in sequence, by the configurations of one folder; then the table of what each measured, and the curves.
#   bash scripts/pipeline.sh configs/smollm2-135m [key.path=value …]
# It is `agrpo pipeline`, in the root of the checkout.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m agrpo.cli pipeline "$@"

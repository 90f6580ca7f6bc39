#!/usr/bin/env bash
# From nothing to a trained model: sets up, runs the three stages, shows what each measured.
# Arguments go to every stage: bash scripts/quickstart.sh run.name=mine seed=1

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec bash scripts/pipeline.sh configs/quickstart "$@"

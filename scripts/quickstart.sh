#!/usr/bin/env bash
# From nothing to a trained model: sets up, runs the three stages, shows what each measured.
# Arguments go to every stage: bash scripts/quickstart.sh run.name=mine seed=1

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

directory=runs
name=quickstart
for argument in "$@"; do
    case "$argument" in
        run.dir=*) directory="${argument#*=}" ;;
        run.name=*) name="${argument#*=}" ;;
    esac
done

bash scripts/setup.sh
for stage in stage1_sft stage2_reward stage3_agrpo; do
    bash "stages/$stage/run.sh" "$@"
done
exec .venv/bin/python -m agrpo.reporting.summary "$directory/$name"

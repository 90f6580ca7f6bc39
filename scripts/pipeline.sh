#!/usr/bin/env bash
# The stages in sequence, by the configurations of one folder; then the table of what each measured, and the curves.
#   bash scripts/pipeline.sh configs/smollm2-135m [key.path=value …]
# Arguments behind the folder go to every stage. A preferences.yaml in the folder samples groups before stage 2;
# without a reward.yaml there is no stage 2.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
configs=${1:?"usage: bash scripts/pipeline.sh CONFIG_FOLDER [key.path=value …]"}
shift
python=.venv/bin/python
[ -x "$python" ] || python=python3

directory=runs
name=$(basename "$configs") # as the run is called in the folder's files
everywhere=()               # what the sampling of preferences understands too
for argument in "$@"; do
    case "$argument" in
        run.dir=*) directory="${argument#*=}" ;;
        run.name=*) name="${argument#*=}" ;;
    esac
    case "$argument" in run.* | seed=*) everywhere+=("$argument") ;; esac
done

bash stages/stage1_sft/run.sh --config "$configs/sft.yaml" "$@"
if [ -f "$configs/preferences.yaml" ]; then
    "$python" -m agrpo.launch stages/stage2_reward/preferences.py --config "$configs/preferences.yaml" \
        "${everywhere[@]}"
fi
if [ -f "$configs/reward.yaml" ]; then
    bash stages/stage2_reward/run.sh --config "$configs/reward.yaml" "$@"
fi
bash stages/stage3_agrpo/run.sh --config "$configs/agrpo.yaml" "$@"
"$python" -m agrpo.reporting.plots "$directory/$name"
exec "$python" -m agrpo.reporting.summary "$directory/$name"

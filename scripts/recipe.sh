#!/usr/bin/env bash
# What the recipes beside this file share: training by a configuration, and evaluating before or after it.
#   bash scripts/recipe.sh train CONFIG [--smoke] [key.path=value …]
#   bash scripts/recipe.sh eval CONFIG base|trained BENCHMARK [--smoke] [arguments of agrpo eval]
# --smoke runs offline in less than a minute: a toy of the model, made-up rows of the data's columns, below SMOKE_DIR
# (runs/smoke). NPROC and NNODES are those of the stages.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
agrpo() { "$python" -m agrpo.cli "$@"; }
of_config() { # a key of the configuration, by its path; nothing where it is not set
    "$python" - "$config" "$1" <<'END'
import functools, pathlib, sys
from agrpo.config import read_config
values = read_config(pathlib.Path(sys.argv[1]))
print(functools.reduce(lambda here, key: here.get(key) or {}, sys.argv[2].split("."), values) or "")
END
}

what=${1:?"usage: bash scripts/recipe.sh train|eval CONFIG …"}
config=${2:?"which configuration?"}
shift 2
if [ "$what" = eval ]; then
    which=$1 benchmark=$2
    shift 2
fi
smoke=${SMOKE_DIR:-runs/smoke}
is_smoke=false
arguments=()
for argument in "$@"; do
    if [ "$argument" = --smoke ]; then is_smoke=true; else arguments+=("$argument"); fi
done

if [ "$what" = train ]; then
    if $is_smoke; then agrpo smoke --config "$config" --out "$smoke" "${arguments[@]}"; else
        agrpo train --config "$config" "${arguments[@]}"
    fi
    exit
fi

name=$(of_config run.name)
model=$(of_config model.name_or_path)
asked=()
if [ "$which" = trained ]; then asked=(--chat --template "{prompt}" --system "$(of_config data.system)"); fi
results=runs/evaluations/$name-$which-$benchmark.json
if $is_smoke; then
    if [ "$which" = trained ]; then
        agrpo smoke --config "$config" --out "$smoke"
        model=$smoke/$name
    else
        agrpo smoke --config "$config" --out "$smoke" --dry-run
        model=$smoke/models/${model//\//--}
    fi
    case "$benchmark" in gsm8k) rows=openai--gsm8k ;; *) rows=HuggingFaceH4--MATH-500 ;; esac
    asked+=(--data "$smoke/data/$rows-6.jsonl" --samples 2 --max-tokens 12)
    results=$smoke/evaluations/$name-$which-$benchmark.json
elif [ "$which" = trained ]; then
    model=runs/$name
fi
mkdir -p "$(dirname "$results")"
agrpo eval --model "$model" --benchmark "$benchmark" "${asked[@]}" --json "$results" "${arguments[@]}"

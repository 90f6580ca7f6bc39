#!/usr/bin/env bash
# The model of AGRPO_math.sh on MATH-500; arguments go to agrpo eval, --smoke rehearses offline.
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipe.sh" eval configs/qwen2.5-7b-math/agrpo.yaml trained math500 "$@"

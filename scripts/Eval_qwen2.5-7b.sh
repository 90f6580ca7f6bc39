#!/usr/bin/env bash
# Qwen2.5-7B-Instruct on MATH-500, untrained; arguments go to agrpo eval, --smoke rehearses offline.
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipe.sh" eval configs/qwen2.5-7b-math/agrpo.yaml base math500 "$@"

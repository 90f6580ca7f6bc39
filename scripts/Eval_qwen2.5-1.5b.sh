#!/usr/bin/env bash
# Qwen2.5-1.5B-Instruct on GSM8K's test set, untrained; arguments go to agrpo eval, --smoke rehearses offline.
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipe.sh" eval configs/qwen2.5-1.5b-gsm8k/agrpo.yaml base gsm8k "$@"

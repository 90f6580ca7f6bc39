#!/usr/bin/env bash
# The model of AGRPO_gsm.sh on GSM8K's test set; arguments go to agrpo eval, --smoke rehearses offline.
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipe.sh" eval configs/qwen2.5-1.5b-gsm8k/agrpo.yaml trained gsm8k "$@"

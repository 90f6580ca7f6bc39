#!/usr/bin/env bash
# GRPO on GSM8K with Qwen2.5-1.5B-Instruct, on one GPU or more; --smoke for a rehearsal offline.
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipe.sh" train configs/qwen2.5-1.5b-gsm8k/grpo.yaml "$@"

#!/usr/bin/env bash
# GRPO on MATH with Qwen2.5-7B-Instruct, over four GPUs (NPROC=4); --smoke for a rehearsal offline.
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipe.sh" train configs/qwen2.5-7b-math/grpo.yaml "$@"

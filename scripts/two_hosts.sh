#!/usr/bin/env bash
# Stage 3 on two hosts that share nothing but a cable: two network namespaces of this machine, joined by a veth pair,
# each running the multi-node command of docs/scaling.md. Its metrics must be those of two processes in one place.
#   bash scripts/two_hosts.sh [DIRECTORY] [key.path=value …]
# Needs root, and `ip` (Debian: iproute2). Arguments go to stage 3 in both places.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v ip >/dev/null || { echo "error: there is no ip command; on Debian: apt-get install iproute2" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "error: network namespaces need root" >&2; exit 2; }
work="${1:-$(mktemp -d)}"
shift || true
mkdir -p "$work"
python=.venv/bin/python
[ -x "$python" ] || python=python3
export OMP_NUM_THREADS=1 # as many threads in both places, so that sums round alike

a="agrpo-a-$$" b="agrpo-b-$$" cable="ag$$"
clean() {
    ip netns delete "$a" 2>/dev/null || true # takes its end of the cable along
    ip netns delete "$b" 2>/dev/null || true
}
trap clean EXIT
ip netns add "$a"
ip netns add "$b"
ip link add "${cable}a" netns "$a" type veth peer name "${cable}b" netns "$b"
for end in "$a ${cable}a 10.77.0.1" "$b ${cable}b 10.77.0.2"; do
    read -r host device address <<<"$end"
    ip -n "$host" address add "$address/24" dev "$device"
    ip -n "$host" link set "$device" up
    ip -n "$host" link set lo up
done

small="evaluation.data=null evaluation.test=null checkpoint.every=0 training.max_steps=4"
few="data.parameters.count=64 sampling.prompts_per_step=4 sampling.num_generations=4 sampling.max_completion_length=16"
model="model.config.hidden_size=32 model.config.intermediate_size=64 model.config.num_hidden_layers=2"
reward="rewards=[{target: reward_models.rules.length, scale: 16, tokens: 4}]" # tells an untrained model's apart

# shellcheck disable=SC2086
stage3() { # NAME [key.path=value …]
    local name="$1"
    shift
    "$python" -m agrpo.launch stages/stage3_agrpo/main.py run.dir="$work" run.name="$name" $small $few "$reward" \
        model.name_or_path="$work/start/sft/model" engine.zero_stage=2 "$@"
}

# shellcheck disable=SC2086
NPROC=1 "$python" -m agrpo.launch stages/stage1_sft/main.py run.dir="$work" run.name=start $small $model \
    data.parameters.count=256 training.batch_size=16
NPROC=2 stage3 one-place "$@"

on() { # HOST DEVICE RANK [key.path=value …]
    local host="$1" device="$2" rank="$3"
    shift 3
    export NNODES=2 NODE_RANK="$rank" NPROC=1 MASTER_ADDR=10.77.0.1 MASTER_PORT=29577
    export GLOO_SOCKET_IFNAME="$device" NCCL_SOCKET_IFNAME="$device"
    export -f stage3
    export python work small few reward
    ip netns exec "$host" bash -c 'stage3 two-hosts "$@"' stage3 "$@"
}
(on "$b" "${cable}b" 1 "$@") >"$work/host-b.log" 2>&1 &
other=$!
(on "$a" "${cable}a" 0 "$@") || { cat "$work/host-b.log" >&2; exit 1; }
wait "$other" || { cat "$work/host-b.log" >&2; exit 1; }
ip -n "$a" -s link show dev "${cable}a" >"$work/cable.txt"

"$python" - "$work" <<'END'
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
one, two = ([json.loads(line) for line in (folder / name / "agrpo" / "metrics.jsonl").read_text().splitlines()]
            for name in ("one-place", "two-hosts"))
assert len(one) == len(two) > 0, (len(one), len(two))
timed = ("time", "throughput", "memory")
different = [
    (a["step"], key, a.get(key), b.get(key))
    for a, b in zip(one, two)
    for key in a.keys() | b.keys()
    if not key.startswith(timed) and a.get(key) != b.get(key)
]
if different:
    sys.exit("the two hosts did not compute what two processes in one place do:\n" + "\n".join(map(str, different)))
moved = [line.split() for line in (folder / "cable.txt").read_text().splitlines()]
received = int(moved[[line[0] for line in moved].index("RX:") + 1][0])
assert received > 100_000, f"only {received} bytes crossed the cable: the hosts did not talk through it"
same = sum(not key.startswith(timed) for key in one[0])
print(f"two hosts: {len(two)} steps, {same} metrics a step, all equal to those of two processes in one place;"
      f" {received:,} bytes reached the first host through the cable")
END

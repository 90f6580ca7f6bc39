"""What a process has held at most."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory() -> int:
    """Bytes of this process at their highest so far: on its GPU what PyTorch allocated there, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

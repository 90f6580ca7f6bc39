"""Memory that a process gives back."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
from pathlib import Path
import torch
from agrpo.engine.memory import give_back

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

held = [torch.zeros(1 << 14) for _ in range(2048)]  # 64 KiB each, 128 MiB in all: none is mapped by itself
pin = held[-1]  # keeps the heap's end where it is
del held
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc alone is told"
)
def test_pages_of_small_tensors_that_were_freed_go_back_to_the_system():
    """In a process of its own, whose heap nothing else has used."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100 << 20

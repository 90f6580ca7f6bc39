"""Memory that a process gives back."""

import ctypes
import os
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


KEEPS = """
import resource
import torch
from agrpo.engine.memory import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(1 << 24)  # 64 MiB: by itself glibc would map each anew
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
print(first, keep_freed(), faults() and faults())
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone is told")
@pytest.mark.parametrize("variable", [None, "MALLOC_TRIM_THRESHOLD_"])
def test_what_is_freed_serves_again_unless_the_environment_says_how(variable):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    own = {**plain, **({variable: "131072"} if variable else {})}
    done = subprocess.run([sys.executable, "-c", KEEPS], capture_output=True, text=True, check=True, env=own)
    first, told, then = done.stdout.split()
    assert told == str(variable is None)
    # Something small may have entered a freed block, which costs fresh pages once.
    assert (int(then) <= int(first) / 4) == (variable is None)

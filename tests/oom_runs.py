"""A stage that runs out of memory once: STAGE WHERE arguments …

WHERE is `forward` or `backward`, in the second micro-batch of the fourth optimiser step, or `generate`, in the third.
"""

import runpy
import sys

import torch
from stage_runs import MAINS

from agrpo.engine.backends.native import NativeBackend
from agrpo.engine.hybrid import HybridEngine

stage, where = sys.argv[1:3]
calls = {"step": 0, "here": 0, "failed": False}


def failing(kind, name, at, error):
    act = getattr(kind, name)

    def once(self, *args, **kwargs):
        calls["here"] += 1
        if not calls["failed"] and calls["step"] >= at and calls["here"] == 2:
            calls["failed"] = True
            raise error
        return act(self, *args, **kwargs)

    setattr(kind, name, once)


step = HybridEngine.step


def counted(self, rate):
    calls["step"] += 1
    calls["here"] = 0
    return step(self, rate)


HybridEngine.step = counted
if where == "generate":
    generate = NativeBackend.generate

    def once(self, *args):
        calls["here"] += 1
        if calls["here"] >= 3 and not calls["failed"]:
            calls["failed"] = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(self, *args)

    HybridEngine.step = step
    NativeBackend.generate = once
elif where == "forward":
    failing(HybridEngine, "forward", 3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
else:
    message = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    failing(HybridEngine, "backward", 3, RuntimeError(f"{message} allocate 2147483648 bytes. Error code 12"))
sys.argv = [MAINS[stage], *sys.argv[3:]]
runpy.run_path(MAINS[stage], run_name="__main__")

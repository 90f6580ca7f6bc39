"""A stage whose loss is NaN on one rank: STAGE RANK FIRST LAST arguments …, optimiser steps FIRST to LAST, from 0.

Ends with an error when a step that was skipped has moved a weight on any rank, or when the ranks disagree on it.
"""

import math
import runpy
import sys

import torch
from stage_runs import MAINS

from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine

stage, *numbers = sys.argv[1:5]
bad_rank, first, last = map(int, numbers)
backward, step = HybridEngine.backward, HybridEngine.step
done = 0


def poisoned(self, loss, end):
    bad = distributed.rank() == bad_rank and first <= done <= last
    backward(self, loss * math.nan if bad else loss, end)


def weights(engine):
    """This rank's, which ZeRO-3 keeps in shards."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]


def checked(self, rate):
    global done
    before = weights(self)
    skipped = self.skipped_steps
    done += 1
    try:
        return step(self, rate)
    finally:
        moved = any(not torch.equal(new, old) for new, old in zip(weights(self), before, strict=True))
        seen = distributed.gather_objects((self.skipped_steps > skipped, moved))
        expected = (first < done <= last + 1, not first < done <= last + 1)
        if seen != [expected] * distributed.world():
            raise AssertionError(f"step {done - 1}: (skipped, moved) is {seen}, not {expected} on every rank")


HybridEngine.backward, HybridEngine.step = poisoned, checked
sys.argv = [MAINS[stage], *sys.argv[5:]]
runpy.run_path(MAINS[stage], run_name="__main__")

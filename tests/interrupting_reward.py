"""A reward that stops its own run once, so that tests of resumption need no clock."""

import os
import signal
from collections import Counter
from pathlib import Path

from reward_models import rules

calls = Counter()  # by flag: a process may hold several runs


def length_until(prompts, completions, completion_ids=None, *, flag, call, number, **columns):
    """Reward by length. At its `call`-th call, if the file `flag` exists, remove it and send the run that signal."""
    calls[flag] += 1
    if calls[flag] == call and Path(flag).exists():
        Path(flag).unlink()
        os.kill(os.getpid(), getattr(signal, number))
    return rules.length(prompts, completions, completion_ids, scale=16, tokens=4)

"""`agrpo benchmark step`, `parts` and `growth`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from agrpo.types import InputError

_USAGE = """usage: agrpo benchmark step  [options]   a whole GRPO step, ours and TRL's
       agrpo benchmark parts [options]   the pieces alone: sampler, forward and backward, head, sync
       agrpo benchmark growth [options]  how a step's cost grows with lengths, groups, pruning, depth and ranks
--help after either tells its options.
"""


def main(arguments: Sequence[str]) -> int:
    what, *rest = arguments or ["--help"]
    try:
        if what == "step":
            from agrpo.benchmark.step import main as step

            return step(rest)
        if what == "parts":
            from agrpo.benchmark.parts import main as parts

            return parts(rest)
        if what == "growth":
            from agrpo.benchmark.growth import main as growth

            return growth(rest)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_USAGE, end="", file=sys.stdout if what in ("-h", "--help") else sys.stderr)
    return 0 if what in ("-h", "--help") else 2

"""Stages one after the other in this process, or in this job of processes: tests of many tiny runs import torch once.

The argument is a list of [stage, arguments] in JSON. In a single process, a run that ends early does not stop those
behind it. The process group stays open between them: DeepSpeed keeps groups for as long as its process lives.
"""

import json
import runpy
import sys
import traceback

from stage_runs import MAINS

from agrpo.engine import distributed


def main(runs):
    stop, distributed.stop = distributed.stop, lambda: None
    for stage, arguments in runs:
        print("run:", *arguments, flush=True)
        sys.argv = [MAINS[stage], *arguments]
        try:
            runpy.run_path(MAINS[stage], run_name="__main__")
        except (Exception, SystemExit):
            if distributed.world() > 1:
                raise  # the other ranks wait for this one
            traceback.print_exc()
    stop()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

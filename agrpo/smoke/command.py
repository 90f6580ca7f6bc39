"""`agrpo smoke --config FILE [--stage STAGE] [--out DIR] [--steps N] [key.path=value …]`."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from agrpo.config import STAGES, stage_of
from agrpo.types import InputError


def main(arguments: list[str]) -> int:
    """Exit code 0 when every stage ran, 2 for a configuration that is wrong, else the failed stage's."""
    parser = argparse.ArgumentParser(
        prog="agrpo smoke", description="Run a configuration offline in seconds: a toy of its model, made-up rows."
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--stage", choices=list(STAGES), help="whose configuration; by default as its file is called")
    parser.add_argument("--out", type=Path, default=Path("runs/smoke"), help="for models, rows and runs")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="make models and rows, and print the commands")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_intermixed_args(arguments)
    os.environ |= {"NPROC": "1", "NNODES": "1"}
    try:
        from agrpo.smoke.plan import plan

        stage = options.stage or stage_of(options.config)
        runs = plan(options.config, stage, options.overrides, options.out, options.steps)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for stage, own in runs:
        command = [sys.executable, "-m", "agrpo.cli", "train" if stage == "agrpo" else stage, *own]
        print(f"smoke: {stage}: {shlex.join(command)}", flush=True)
        if options.dry_run:
            continue
        if code := subprocess.run(command, check=False).returncode:
            return code
    return 0

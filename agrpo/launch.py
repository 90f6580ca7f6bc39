"""Start a stage: check its configuration before anything heavy loads, then run it in one process or in several.

    python -m agrpo.launch stages/stage3_agrpo/main.py [--config FILE] [key.path=value …] [--print-config]

NPROC, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT come from the environment. With more than one process torchrun's
own launcher starts them; the first process that fails gives the exit code.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from agrpo.config import count_from_environment, parse_command_line
from agrpo.yaml_input import ConfigError


def stage_of(main: Path) -> str:
    """stages/stage3_agrpo/main.py → agrpo; stages/stage2_reward/preferences.py → preferences."""
    return main.resolve().parent.name.split("_", 1)[-1] if main.stem == "main" else main.stem


def processes() -> int:
    """NPROC, or one for each GPU, or one."""
    if os.environ.get("NPROC"):
        return count_from_environment("NPROC")
    if shutil.which("nvidia-smi") is None:
        return 1
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return max(1, sum(line.startswith("GPU ") for line in listed.splitlines()))


def main(argv: list[str] | None = None, check: Callable[[list[str]], object] | None = None) -> int:
    """Run a script in as many processes as the environment asks for.

    Args:
        argv: the script and its arguments.
        check: of the arguments before anything starts; exits when they are wrong. By default as a stage's are.
    """
    script, *arguments = sys.argv[1:] if argv is None else argv
    try:
        count, nodes = processes(), count_from_environment("NNODES")
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    os.environ["NPROC"] = str(count)
    (check or partial(parse_command_line, stage_of(Path(script))))(arguments)  # exits 0 or 2
    if count == 1 and nodes == 1:
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        return 0
    return _torchrun(script, arguments, count, nodes)


def _torchrun(script: str, arguments: list[str], count: int, nodes: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    where = ["--standalone"]
    if nodes > 1:
        where = [
            f"--nnodes={nodes}",
            f"--node-rank={os.environ.get('NODE_RANK', '0')}",
            f"--master-addr={os.environ.get('MASTER_ADDR', '127.0.0.1')}",
            f"--master-port={os.environ.get('MASTER_PORT', '29500')}",
        ]
    options = get_args_parser().parse_args([*where, f"--nproc-per-node={count}", script, *arguments])
    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} ended first, with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException:
        return 75
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

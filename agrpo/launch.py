"""Start a stage: check its configuration before anything heavy loads, then run it in one process or in several.

    python -m agrpo.launch stages/stage3_agrpo/main.py [--config FILE] [key.path=value …] [--print-config]

NPROC, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT come from the environment. With more than one process this one
starts and watches those of its machine, with the environment that torchrun would give them. SIGTERM, SIGUSR1 and SIGINT
reach all of them as the same request to save and stop. A rank that dies or hangs ends the job, and is named.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path

from agrpo import job

if __name__ == "__main__":
    job.listen()  # before the imports that take a moment

from agrpo.config import EngineConfig, count_from_environment, parse_command_line
from agrpo.yaml_input import ConfigError

RESUME_LATER = 75
_SAVING = ("sft", "reward", "agrpo")  # stages that stop at a signal, saved
_POLL_S = 0.05
_GRACE_S = 2.0  # for the other ranks' reports, once one has failed
_SET_UP_S = 600.0  # without progress, at least, before the first step: imports and large models
_SAVED_GRACE_S = 30.0  # between the first rank that has saved and ended and the last


def stage_of(main: Path) -> str:
    """stages/stage3_agrpo/main.py → agrpo; stages/stage2_reward/preferences.py → preferences."""
    return main.resolve().parent.name.split("_", 1)[-1] if main.stem == "main" else main.stem


def processes() -> int:
    """NPROC, or one for each GPU that CUDA_VISIBLE_DEVICES leaves, or one."""
    if os.environ.get("NPROC"):
        return count_from_environment("NPROC")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # CUDA itself reads no further than the first number that is none
        named = takewhile(lambda name: name and not name.startswith("-"), (n.strip() for n in visible.split(",")))
        return max(1, len(list(named)))
    if shutil.which("nvidia-smi") is None:
        return 1
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return max(1, sum(line.startswith("GPU ") for line in listed.splitlines()))


def use_huge_pages() -> None:
    """Have PyTorch ask Linux for huge pages for tensors of 2 MiB and more, unless the environment says otherwise.

    PyTorch reads this at its first tensor, which importing a model's library may make.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main(argv: list[str] | None = None, check: Callable[[list[str]], object] | None = None) -> int:
    """Run a script in as many processes as the environment asks for.

    Args:
        argv: the script and its arguments.
        check: of the arguments before anything starts; exits when they are wrong. By default as a stage's are.
    """
    use_huge_pages()
    script, *arguments = sys.argv[1:] if argv is None else argv
    saves = stage_of(Path(script)) in _SAVING
    if saves:
        job.listen()
    elif job.stop_asked():
        return 128 + signal.SIGTERM
    else:
        job.hear_nothing()
    if "RANK" in os.environ:  # one of several, whoever started them
        return _here(script, arguments)
    try:
        count, nodes = processes(), count_from_environment("NNODES")
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    os.environ["NPROC"] = str(count)
    told = partial(print, file=sys.stderr)
    read = check or partial(parse_command_line, stage_of(Path(script)), note=told)
    config = read(arguments)  # exits 0 or 2
    if count == 1 and nodes == 1:
        return _here(script, arguments)
    with tempfile.TemporaryDirectory(prefix="agrpo-job-") as folder:
        ranks = _Ranks(Path(folder), [sys.executable, "-m", "agrpo.launch", script, *arguments], count, nodes)
        job.listen()
        try:
            return ranks.watch(getattr(config, "engine", EngineConfig()).hang_timeout_s, saves)
        finally:
            ranks.kill()
            job.over()


def _here(script: str, arguments: list[str]) -> int:
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        job.over()
    return 0


class _Ranks:
    """The ranks of this machine as child processes, and the folder that they share with this one."""

    def __init__(self, folder: Path, command: list[str], count: int, nodes: int) -> None:
        self._folder = folder
        self._first = count * int(os.environ.get("NODE_RANK") or 0)
        where = {
            "MASTER_ADDR": os.environ.get("MASTER_ADDR") or "127.0.0.1",
            "MASTER_PORT": (os.environ.get("MASTER_PORT") or "29500") if nodes > 1 else _free_port(),
            "WORLD_SIZE": str(count * nodes),
            "LOCAL_WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count)),
            job.FOLDER: str(folder),
        }
        self._processes = [
            subprocess.Popen(
                command, env={**os.environ, **where, "RANK": str(self._first + local), "LOCAL_RANK": str(local)}
            )
            for local in range(count)
        ]

    def watch(self, hang_timeout: float, saves: bool = True) -> int:
        """Wait for the ranks; the exit code of the job.

        Args:
            hang_timeout: seconds without progress after which the job ends.
            saves: they can stop and resume; without, a signal ends them where they are.
        """
        stopping = False
        moved, marks = time.monotonic(), [0] * len(self._processes)
        ended_at: float | None = None
        while True:
            time.sleep(_POLL_S)
            if job.stop_asked() and not stopping:
                stopping = True
                if not saves:
                    return 128 + signal.SIGTERM
                (self._folder / job.STOP).touch()
            codes = [process.poll() for process in self._processes]
            if any(code not in (None, 0, RESUME_LATER) for code in codes):
                return self._name_the_first()
            if None not in codes:
                return max(codes)
            if RESUME_LATER in codes or 0 in codes:
                ended_at = ended_at or time.monotonic()
                if time.monotonic() - ended_at > _SAVED_GRACE_S:
                    print("a rank did not end with the others: killed", file=sys.stderr)
                    return max(code for code in codes if code is not None) or 1
            progress = [self._progress(local) for local in range(len(codes))]
            patience = hang_timeout
            if any(one.step is None for one in progress):
                patience = max(hang_timeout, _SET_UP_S)
            if [one.marks for one in progress] != marks:
                moved, marks = time.monotonic(), [one.marks for one in progress]
            elif time.monotonic() - moved > patience:
                return self._name_the_hung(marks, patience)

    def _progress(self, local: int) -> job.Progress:
        return job.progress(self._folder, self._first + local)

    def _name_the_first(self) -> int:
        """The rank that failed first: killed by a signal, or the earliest that left a message. Its exit code."""
        until = time.monotonic() + _GRACE_S
        while time.monotonic() < until and any(process.poll() is None for process in self._processes):
            time.sleep(_POLL_S)

        def order(local: int) -> tuple[bool, float]:
            message = job.reported(self._folder, self._first + local)
            return self._processes[local].returncode >= 0, message[0] if message else float("inf")

        failed = [n for n, p in enumerate(self._processes) if p.poll() not in (None, 0, RESUME_LATER)]
        first = min(failed, key=order)
        code, rank = self._processes[first].returncode, self._first + first
        phase = self._progress(first)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        message = job.reported(self._folder, rank)
        if message:
            print(f"error: {message[1]}", file=sys.stderr)
        print(f"rank {rank} {how} in phase '{phase}'; the job ends", file=sys.stderr)
        return 128 - code if code < 0 else code

    def _name_the_hung(self, marks: list[int], seconds: float) -> int:
        behind = [n for n, count in enumerate(marks) if count == min(marks)]
        frozen = [n for n in behind if _state(self._processes[n].pid) in "TtD"]
        behind = frozen or behind
        for n in behind:
            self._processes[n].send_signal(job.TELL_STACK)
        time.sleep(0.5)  # while they print where they are
        whole = len(behind) == len(marks)
        for n in behind:
            phase = self._progress(n)
            waits = "" if whole else ", and the others wait for it"
            print(
                f"rank {self._first + n} hangs: no progress for {seconds:g} s in phase '{phase}'{waits}",
                file=sys.stderr,
            )
        print("its stack is above; the job ends. A longer wait: engine.hang_timeout_s", file=sys.stderr)
        return 1

    def kill(self) -> None:
        """No rank outlives the launcher."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()


def _state(pid: int) -> str:
    """A process's state as Linux tells it: T stopped, D in the kernel, S asleep as one that waits for others is."""
    path = Path(f"/proc/{pid}/stat")
    return path.read_text().rpartition(")")[2].split()[0] if path.exists() else "S"


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


if __name__ == "__main__":
    raise SystemExit(main())

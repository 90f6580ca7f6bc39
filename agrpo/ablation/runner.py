"""Running a plan: each run a process of its own, some side by side; what has finished is never run again."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from agrpo.ablation.grid import Job, Plan
from agrpo.places import own_folder
from agrpo.reporting.files import replace
from agrpo.types import InputError
from agrpo.yaml_input import ConfigError

_ROOT = Path(__file__).resolve().parents[2]
_MAINS = {"sft": "stage1_sft/main.py", "agrpo": "stage3_agrpo/main.py"}
_STOPPED = 75


@dataclass(frozen=True)
class Manner:
    """How runs are started."""

    jobs: int = 1  # side by side
    threads: int = 1  # of each
    prefix: tuple[str, ...] = ()  # a command before each run's own, such as nice -n 10


@dataclass(frozen=True)
class Failure:
    name: str
    reason: str
    log: Path


class Stopped(Exception):
    """A signal came; what ran was asked to save itself, and has ended."""


def require_unchanged(plan: Plan) -> None:
    """Refuse to mix runs of different configurations in one table.

    Raises:
        ConfigError: names the runs and the keys that differ.
    """
    changed = [(job, keys) for job in (*plan.sft, *plan.jobs) if (keys := job.changed())]
    stale = [job.name for job in _without_their_model(plan)]
    if not changed and not stale:
        return
    lines = [
        f"{job.directory}: holds a run with another configuration ({', '.join(keys)} differ)" for job, keys in changed
    ]
    if stale:
        lines.append(f"{plan.grid.root}: the SFT model that {', '.join(stale)} started from is not there any more")
    mend = "give the grid another name, restore those keys, or run these again with --redo"
    raise ConfigError("\n".join([*lines, mend]))


def forget_changed(plan: Plan) -> list[str]:
    """Delete the runs that `require_unchanged` refuses, and those that start from them; their names."""
    sft = [job for job in plan.sft if job.changed()]
    seeds = {job.seed for job in sft}
    again = [job for job in plan.jobs if job.changed() or (job.seed in seeds and job.directory.exists())]
    again += [job for job in _without_their_model(plan) if job not in again]
    for job in (*sft, *again):
        shutil.rmtree(job.config.run_root)
    return [job.name for job in (*sft, *again)]


def _without_their_model(plan: Plan) -> list[Job]:
    gone = {job.seed for job in plan.sft if not job.finished}
    return [job for job in plan.jobs if job.seed in gone and job.finished]


@contextmanager
def sole_owner(root: Path) -> Iterator[IO[bytes]]:
    """The lock of a grid's directory. The runs inherit it, so one that outlives this process holds it still.

    Raises:
        InputError: another process holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{root}: another agrpo ablate, or a run that one has left behind, works here; wait until it has ended"
            ) from None
        yield lock


class Runner:
    """Runs what a plan has left to do. SIGTERM and SIGINT ask the runs at hand to save themselves, and end."""

    def __init__(self, plan: Plan, manner: Manner, lock: IO[bytes], tell: Callable[[str], None]) -> None:
        self._plan, self._manner, self._lock, self._tell = plan, manner, lock, tell
        self._live: set[subprocess.Popen[bytes]] = set()
        self._stop = False

    def run(self) -> list[Failure]:
        """The SFT models, then the cells; those that failed. One that fails stops none of the others.

        Raises:
            Stopped: by a signal.
        """
        previous = {name: signal.signal(name, self._ask_to_stop) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            failures = self._run_all(self._plan.sft)
            without = {job.seed for job in self._plan.sft if not job.finished}
            failures += self._run_all([job for job in self._plan.jobs if job.seed not in without])
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)
        if self._stop:
            raise Stopped
        return failures

    def _run_all(self, jobs: Sequence[Job]) -> list[Failure]:
        todo = [job for job in jobs if not job.finished]
        if todo:
            self._tell(f"{len(jobs) - len(todo)} of {len(jobs)} {todo[0].stage} runs are there; {len(todo)} to do")
        with ThreadPoolExecutor(self._manner.jobs) as pool:
            results = list(pool.map(lambda item: self._run(*item, len(todo)), enumerate(todo, 1)))
        return [failure for failure in results if failure is not None]

    def _run(self, place: int, job: Job, total: int) -> Failure | None:
        if self._stop:
            return None
        root = self._plan.grid.root
        file, log = root / "configs" / f"{job.name}.yaml", root / "logs" / f"{job.name}.log"
        for folder in (file.parent, log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        replace(file, [yaml.safe_dump(dict(job.values), sort_keys=False, allow_unicode=True)])
        began = time.monotonic()
        code = self._execute([str(own_folder("stages") / _MAINS[job.stage]), "--config", str(file)], log)
        seconds = time.monotonic() - began
        if code == 0 and job.finished:
            self._tell(f"[{place}/{total}] {job.name}: {seconds:.0f} s")
            return None
        if self._stop:
            return None
        reason = "was stopped; run again to resume" if code == _STOPPED else f"exit code {code}: {_last_line(log)}"
        self._tell(f"[{place}/{total}] {job.name}: FAILED, {reason}")
        return Failure(job.name, reason, log)

    def _execute(self, arguments: list[str], log: Path) -> int:
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self._manner.threads),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self._manner.prefix, sys.executable, "-m", "agrpo.launch", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(self._lock.fileno(),),
                start_new_session=True,  # a Ctrl-C at the terminal reaches this process alone, which passes it on
            )
        self._live.add(process)
        if self._stop:
            self._pass_on(process)
        code = process.wait()
        if self._stop:
            _wait_for_group(process.pid)
        self._live.discard(process)
        return code

    def _ask_to_stop(self, number: int, frame: object) -> None:
        if not self._stop:
            self._stop = True
            self._tell("stopping: the runs at hand save themselves first")
            for process in list(self._live):
                self._pass_on(process)

    def _pass_on(self, process: subprocess.Popen[bytes]) -> None:
        """A signal to a run, or to all behind a prefix; once, since a second one ends a stage without saving."""
        if process not in self._live:
            return
        self._live.discard(process)
        with suppress(ProcessLookupError):
            (os.killpg if self._manner.prefix else os.kill)(process.pid, signal.SIGTERM)


def _wait_for_group(group: int, seconds: float = 120) -> None:
    """A prefix may end at a signal before the run behind it has saved itself."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"

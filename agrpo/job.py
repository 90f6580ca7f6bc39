"""A process's place in its job: whether it is told to stop, and what it says that it is doing.

Signals set a flag and nothing else, so they may come at any moment. The launcher of several processes shares a folder
with them, AGRPO_JOB: it leaves the file `stop` there, and each rank keeps a record of its progress, which outlives it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = "AGRPO_JOB"
STOP = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TELL_STACK = signal.SIGUSR2  # a rank that hangs is asked where
_RECORD = struct.Struct("<qq64s")  # marks so far, the step or -1 before the first, the phase
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Progress:
    """How far a rank has come: every mark is a collective or a change of phase, the same ones on every rank."""

    marks: int
    step: int | None  # None before the first
    phase: str

    def __str__(self) -> str:
        return self.phase if self.step is None else f"step {self.step}: {self.phase}"


class _Place:
    asked = False
    phase = "set-up"
    step: int | None = None
    marks = 0
    record: int | None = None


def listen() -> None:
    """Take the signals that ask to stop. A second SIGINT interrupts at once; other repetitions change nothing."""
    for name in SIGNALS:
        signal.signal(name, _ask_to_stop)
    folder = _folder()
    if folder is None:
        return
    faulthandler.register(TELL_STACK, all_threads=False)
    if sys.platform == "linux":  # without its launcher a rank would be an orphan: it stops as if asked to
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if _Place.record is None:
        _Place.record = os.open(_record_of(folder, int(os.environ["RANK"])), os.O_CREAT | os.O_WRONLY, 0o600)
    mark()


def hear_nothing() -> None:
    """Leave signals to do what they do by default: for what has nothing to save."""
    for name in SIGNALS:
        signal.signal(name, signal.default_int_handler if name == signal.SIGINT else signal.SIG_DFL)


def over() -> None:
    """All is saved. Python takes its handlers away before it ends: a signal then must not change the exit code."""
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)


def _ask_to_stop(number: int, frame: object) -> None:
    if _Place.asked and number == signal.SIGINT:
        raise KeyboardInterrupt
    _Place.asked = True


def stop_asked() -> bool:
    """Has a signal come, here or at the launcher? Ranks learn it at different times: agree before acting on it."""
    if not _Place.asked:
        folder = _folder()
        _Place.asked = folder is not None and (folder / STOP).exists()
    return _Place.asked


def stopped() -> None:
    """The run that was asked has stopped; another one in this process has not been asked."""
    _Place.asked = False


def enter(phase: str, step: int | None = None) -> None:
    """Say what comes now, such as `update`, and in which step if that has changed."""
    _Place.phase = phase
    _Place.step = _Place.step if step is None else step
    mark()


def mark() -> None:
    """Something is done and the next thing begins: a rank that hangs is the one that falls behind."""
    _Place.marks += 1
    if _Place.record is not None:
        step = -1 if _Place.step is None else _Place.step
        os.pwrite(_Place.record, _RECORD.pack(_Place.marks, step, _Place.phase.encode()[:64]), 0)


def report(error: str) -> bool:
    """Leave the message of an error for the launcher to print; False where there is no launcher to do it."""
    folder = _folder()
    if folder is None:
        return False
    _error_of(folder, int(os.environ["RANK"])).write_text(error, encoding="utf-8")
    return True


# The launcher's side.


def progress(folder: Path, rank: int) -> Progress:
    path = _record_of(folder, rank)
    content = path.read_bytes() if path.exists() else b""
    if len(content) < _RECORD.size:
        return Progress(0, None, "start-up")
    marks, step, phase = _RECORD.unpack(content[: _RECORD.size])
    return Progress(marks, None if step < 0 else step, phase.rstrip(b"\0").decode(errors="replace"))


def reported(folder: Path, rank: int) -> tuple[float, str] | None:
    """When a rank failed and its message, if it could leave one."""
    path = _error_of(folder, rank)
    return (path.stat().st_mtime, path.read_text(encoding="utf-8")) if path.exists() else None


def _folder() -> Path | None:
    name = os.environ.get(FOLDER)
    return Path(name) if name and "RANK" in os.environ else None


def _record_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"


def _error_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.error"

"""One place to run programs in, one after another: an empty folder, and a process for each that leaves nothing behind.

The process can make no second one, so killing it ends the run. The trainer keeps the deadline and reads no more than
the limit; the kernel keeps memory, files and everything else.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reward_models.sandbox import landlock, seccomp
from reward_models.sandbox.interpreter import InterpreterError, readable
from reward_models.sandbox.process import Nursery, Process, SandboxError, order


@dataclass(frozen=True)
class Limits:
    """Of one run. The deadline counts from when the interpreter is ready to run the program."""

    deadline_s: float = 5.0
    memory_bytes: int = 512 << 20  # of address space

    def __post_init__(self) -> None:
        if not 0 < self.deadline_s < math.inf or self.memory_bytes < 64 << 20:
            raise ValueError("a sandbox needs a positive deadline and at least 64 MB of memory")


@dataclass(frozen=True)
class Ending:
    """How a script's process ended, and what it printed until then.

    `cause` is "exited" (by itself, or by the kernel's hand: then the status is negative), "deadline", "output",
    "threads" or "files": which limit the parent killed it for.
    """

    cause: str
    status: int
    output: bytes

    @property
    def well(self) -> bool:
        return self.cause == "exited" and self.status == 0


class Room:
    """Runs programs one at a time; a context manager. Another thread may set `cancelled` to end the run at hand.

    Raises:
        SandboxError: this machine or kernel cannot isolate; the message says what is missing.
    """

    def __init__(self, limits: Limits, cancelled: threading.Event | None = None) -> None:
        self._limits = limits
        self._cancelled = cancelled or threading.Event()
        self._nursery: Nursery | None = None
        self._confinement = {
            "filter": _filter(),
            "restrict_self": landlock.RESTRICT_SELF,
            "memory_bytes": limits.memory_bytes,
            "cpu_seconds": math.ceil(limits.deadline_s) + 2,
        }
        self.folder = tempfile.mkdtemp(prefix="sandbox-")
        try:
            self._rules = landlock.ruleset(readable(), self.folder)
        except (OSError, InterpreterError) as error:
            shutil.rmtree(self.folder)
            raise SandboxError(f"no isolation: {error}") from error

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close_nursery()
        os.close(self._rules)
        shutil.rmtree(self.folder)

    def script(self, source: str, stdin: str = "") -> Ending:
        """Run a program as `__main__`, with this input.

        Raises:
            SandboxError: the process did not start.
            Cancelled: before the run was over.
        """
        with self._started(source, questions=False) as process:
            process.send(stdin.encode("utf-8", "surrogatepass"), last=True)
            cause = process.listen(lines=None)
        ready = process.output.index(b"\n") + 1
        return Ending(cause, process.status, bytes(process.output[ready:]))

    def answers(self, source: str, questions: Sequence[tuple[str, bool]]) -> list[str | bool | None]:
        """Run a program as a module, then ask it questions, in order, in its namespace.

        Args:
            questions: (code, whether its value is wanted). Code whose value is not wanted is statements.

        Returns:
            A value as JSON, for `values.same`. True for statements that ran to their end. None where the code raised,
            where the program did not get there in time, and for all where the program itself raised.

        Raises:
            SandboxError: the process did not start.
            Cancelled: before the run was over.
        """
        asked = [(code, "" if wanted else secrets.token_hex(16)) for code, wanted in questions]
        with self._started(source, questions=True) as process:
            if process.listen(lines=2) == "lines":  # "ready", "loaded"
                process.send(order(asked))
                process.listen(lines=2 + len(asked))
        lines = process.output.decode("ascii", "replace").split("\n")[2:-1]
        answers: list[str | bool | None] = [None] * len(asked)
        for index, ((_, secret), line) in enumerate(zip(asked, lines, strict=False)):
            if secret:
                answers[index] = line == secret or None
            elif line != "-":
                answers[index] = line
        return answers

    @contextlib.contextmanager
    def _started(self, source: str, *, questions: bool) -> Iterator[Process]:
        """A process that has given up its rights and has the program; it is gone afterwards and the folder empty."""
        try:
            if self._nursery is None:
                self._nursery = Nursery(self._rules, self.folder, self._confinement)
            process = Process(self._nursery, self._cancelled)
        except OSError as error:
            self._close_nursery()
            raise SandboxError(f"a sandboxed process did not start: {error}") from error
        try:
            process.send(order({"source": source, "questions": questions}))
            cause = process.listen(lines=1)
            if not process.output.startswith(b"ready\n"):
                said = process.output.decode("utf-8", "replace").strip()
                raise SandboxError(f"a sandboxed process did not start: {said or cause}")
            process.start_clock(self._limits.deadline_s)
            yield process
        finally:
            try:
                process.stop()
            except OSError as error:  # killed from outside, for want of memory perhaps
                self._close_nursery()
                raise SandboxError(f"a sandboxed process was lost: {error}") from error
            finally:
                for name in os.listdir(self.folder):
                    os.unlink(os.path.join(self.folder, name))

    def _close_nursery(self) -> None:
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None


def _filter() -> bytes:
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in seccomp.machines():
        raise SandboxError(
            f"no isolation on {platform.system()} {machine}: it needs Linux on {' or '.join(seccomp.machines())}"
        )
    return seccomp.bpf(machine)

"""The trainer's ends of the sandbox's processes: the nursery that forks them, and each run's own."""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import socket
import subprocess
import threading
import time

from reward_models.sandbox import interpreter

START_SECONDS = 30.0  # for a process to be ready; generous, because the trainer may be using every core
MAX_OUTPUT_BYTES = 4 << 20
_MAX_THREADS, _MAX_FILES = 64, 64  # looked at with every tick; between two ticks there may be more
_TICK_SECONDS = 0.02


class SandboxError(RuntimeError):
    """Isolation is not to be had, or a sandboxed process did not start. Never the program's own fault."""


class Cancelled(RuntimeError):
    """The run was ended from outside, before its time."""


def order(content: object) -> bytes:
    """A message for `inside`."""
    data = marshal.dumps(content)
    return len(data).to_bytes(4, "big") + data


class Nursery:
    """A process that has given up its rights, and forks a child for each run. It dies with the thread that made it.

    Args:
        rules: a descriptor of Landlock's rules.
        confinement: the other rights to give up, as `inside` reads them.

    Raises:
        SandboxError: it did not start, or could not give up its rights; the message says which.
    """

    def __init__(self, rules: int, folder: str, confinement: dict) -> None:
        self.folder = folder
        self._socket, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                interpreter.START,
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                pass_fds=[rules],
                cwd=folder,
                env=interpreter.environment(folder),
                start_new_session=True,  # no terminal, and Ctrl-C is ours to handle
            )
        except OSError as error:
            self._socket.close()
            raise SandboxError(f"a sandboxed process did not start: {error}") from error
        finally:
            theirs.close()
        self._socket.settimeout(START_SECONDS)
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and perhaps it said why
                self._socket.sendall(order({**confinement, "rules": rules, "parent": os.getpid()}))
            said = self._socket.recv(1000)
        except OSError as error:
            said = str(error).encode()
        if said != b"ready\n":
            self.close()
            raise SandboxError(f"a sandboxed process did not start: {said.decode('utf-8', 'replace').strip()}")

    def fork(self, stdin: int, stdout: int) -> tuple[int, int]:
        """A child with these pipes: its number, and a descriptor that stands for it even when it has ended.

        Raises:
            OSError: the nursery is gone.
        """
        socket.send_fds(self._socket, [b"f"], [stdin, stdout])
        child = int.from_bytes(self._receive(4), "big")
        hold = os.pidfd_open(child)
        self._socket.sendall(b"h")
        return child, hold

    def status(self) -> int:
        """Wait for the child's end: its exit status, negative for a signal.

        Raises:
            OSError: the nursery is gone.
        """
        return int.from_bytes(self._receive(4), "big", signed=True)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _receive(self, length: int) -> bytes:
        received = self._socket.recv(length, socket.MSG_WAITALL)
        if len(received) < length:
            raise ConnectionResetError("the sandbox's first process has ended")
        return received


class Process:
    """One run. `output` is what it has printed so far, `status` its exit status once it was stopped."""

    def __init__(self, nursery: Nursery, cancelled: threading.Event) -> None:
        self.output = bytearray()
        self.status = 0
        self._nursery, self._cancelled = nursery, cancelled
        self._until = time.monotonic() + START_SECONDS
        self._lines = 0  # in output; counted as they come, for a flood may come byte by byte
        self._unsent, self._last = memoryview(b""), False
        theirs_in, self._stdin = os.pipe()
        self._stdout, theirs_out = os.pipe()
        try:
            self._number, self._hold = nursery.fork(theirs_in, theirs_out)
        except BaseException:
            os.close(self._stdin)
            os.close(self._stdout)
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        os.set_blocking(self._stdin, False)
        self._poll = select.poll()
        self._poll.register(self._hold, select.POLLIN)  # readable when the process has ended
        self._poll.register(self._stdout, select.POLLIN)

    def start_clock(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def send(self, data: bytes, last: bool = False) -> None:
        """To be written while listening. After the last the process reads the end of its input."""
        self._unsent, self._last = memoryview(bytes(self._unsent) + data), last
        self._poll.register(self._stdin, select.POLLOUT)

    def listen(self, lines: int | None) -> str:
        """Until it has printed that many lines in all, or without a number until it ends.

        Returns:
            "lines" or "exited"; "deadline", "output", "threads", "files" for the limit that it has passed.

        Raises:
            Cancelled: before that.
        """
        tick = time.monotonic() + _TICK_SECONDS
        while lines is None or self._lines < lines:
            events = dict(self._poll.poll(1000 * max(0.0, min(self._until, tick) - time.monotonic())))
            if self._stdin in events:
                self._write()
            if self._stdout in events:
                self._read()
            elif self._hold in events:  # and nothing is left to read
                return "exited"
            now = time.monotonic()
            if len(self.output) > MAX_OUTPUT_BYTES:
                return "output"
            if now >= self._until:
                return "deadline"
            if now >= tick:
                if self._cancelled.is_set():
                    raise Cancelled
                if (excess := self._excess()) is not None:
                    return excess
                tick = now + _TICK_SECONDS
        return "lines"

    def stop(self) -> None:
        """Kill it if it still runs, and see it gone. `status` is its exit status then, negative for a signal.

        Raises:
            OSError: the nursery is gone; then so is the process.
        """
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._hold, signal.SIGKILL)
            ended = select.poll()
            ended.register(self._hold, select.POLLIN)
            ended.poll(1000 * START_SECONDS)  # also when the nursery cannot tell any more
            self.status = self._nursery.status()
        finally:
            for descriptor in {self._hold, self._stdin, self._stdout} - {-1}:
                os.close(descriptor)

    def _write(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._stdin, self._unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it reads no more
            self._unsent = memoryview(b"")
        if not self._unsent:
            self._poll.unregister(self._stdin)
            if self._last:
                os.close(self._stdin)
                self._stdin = -1

    def _read(self) -> None:
        part = os.read(self._stdout, 1 << 16)
        self.output += part
        self._lines += part.count(b"\n")
        if not part:
            self._poll.unregister(self._stdout)  # it closed its output, and may well go on

    def _excess(self) -> str | None:
        """What there is too much of that the kernel does not limit by itself."""
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            if os.stat(f"/proc/{self._number}/task").st_nlink - 2 > _MAX_THREADS:
                return "threads"
        return "files" if len(os.listdir(self._nursery.folder)) > _MAX_FILES else None

"""Many programs in sandboxes side by side, and the proof that a sandbox holds here."""

from __future__ import annotations

import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from reward_models.sandbox.process import START_SECONDS, SandboxError
from reward_models.sandbox.room import Limits, Room

Item = TypeVar("Item")
Result = TypeVar("Result")


class Sandbox:
    """Runs jobs in `workers` rooms at a time. Nothing stays behind between two calls of `map`, process or folder.

    `errors` counts jobs without a result, because their process did not start twice in a row; `last_error` says why.
    """

    def __init__(self, workers: int = 4, limits: Limits | None = None) -> None:
        if workers < 1:
            raise ValueError("a sandbox needs at least 1 worker")
        self.workers, self.limits = workers, limits or Limits()
        self.errors = 0
        self.last_error = ""
        self._under_way: list[tuple[deque, threading.Event]] = []

    def map(self, job: Callable[[Room, Item], Result], items: Sequence[Item]) -> list[Result | None]:
        """`job(room, item)` for every item, in threads of this process; results in order.

        None where the sandbox did not start: that says nothing about the program.

        Raises:
            SandboxError: no process started at all.
            Cancelled: by `cancel`.
            Exception: what a job raised.
        """
        queue = deque(enumerate(items))
        results: list[Result | None] = [None] * len(items)
        not_started: list[SandboxError] = []
        cancelled = threading.Event()

        def serve() -> None:
            with Room(self.limits, cancelled) as room:
                while True:
                    try:
                        index, item = queue.popleft()
                    except IndexError:
                        return
                    results[index] = self._run(job, room, item, not_started)

        self._under_way.append((queue, cancelled))
        with ThreadPoolExecutor(self.workers) as executor:
            served = [executor.submit(serve) for _ in range(min(self.workers, len(items)))]
            try:
                for one in wait(served, return_when=FIRST_EXCEPTION).done:
                    one.result()
            except BaseException:  # an interrupt too: what runs is ended before this is left
                queue.clear()
                cancelled.set()
                raise
            finally:
                self._under_way.remove((queue, cancelled))
        if items and len(not_started) == len(items):
            raise not_started[0]
        return results

    def cancel(self) -> None:
        """End what other threads have under way here, within a moment."""
        for queue, cancelled in list(self._under_way):
            queue.clear()
            cancelled.set()

    def _run(self, job: Callable, room: Room, item: object, not_started: list[SandboxError]) -> object:
        try:
            try:
                return job(room, item)
            except SandboxError:  # a moment's want of memory or processes, perhaps
                return job(room, item)
        except SandboxError as error:
            not_started.append(error)
            self.errors += 1
            self.last_error = str(error)
            return None


_PROBE = """
import os, _socket
def attempt(what, act):
    try:
        act()
    except OSError:
        return
    print(what)
attempt("read a file outside its folder", lambda: open({path!r}))
attempt("open a socket", _socket.socket)
attempt("start a process", lambda: os.fork() or os._exit(0))
attempt("signal another process", lambda: os.kill(os.getppid(), 0))
import json
with open("own", "w") as file:
    json.dump("done", file)
print(open("own").read())
"""


def why_unavailable() -> str | None:
    """None where a sandbox starts here and does refuse what it must; else what is missing, in words.

    It starts one and tries: a kernel may have the calls and not keep the rules.
    """
    with tempfile.NamedTemporaryFile() as outside:
        try:
            with Room(Limits(deadline_s=START_SECONDS)) as room:
                ending = room.script(_PROBE.format(path=outside.name))
        except SandboxError as error:
            return str(error)
    *escapes, last = ending.output.decode("utf-8", "replace").splitlines() or [""]
    if escapes:
        return f"no isolation: in the sandbox a program could {', '.join(escapes)}"
    if not ending.well or last != '"done"':
        return f"no isolation: a harmless program does not run in the sandbox ({ending.cause}, status {ending.status})"
    return None

"""Isolated worker processes for code that reads model text: symbolic mathematics, task verifiers, what may hang.

A thread cannot be stopped and SIGALRM does not interrupt C code, so each job runs in a process that can be killed. Jobs
and results travel as JSON lines; no model text is ever unpickled. A worker that misses its deadline or crashes costs
its own job only. Workers do not import torch unless the function's own module does.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import importlib
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

LOAD_SECONDS = (
    60.0  # importing a verifier's module, once a worker; generous, because the trainer may be using every core
)


class VerifierError(RuntimeError):
    """The function cannot be run at all: its module does not import, or the pool is closed."""


class VerifierPool:
    """Persistent worker processes, each with a memory limit, and a deadline for every job.

    `errors` counts jobs that gave no result, by cause: "deadline", "crashed" (also out of memory), "raised";
    `last_error` is the latest cause in words. Use it as a context manager or call `close`. Workers also die with this
    process, however it ends.
    """

    def __init__(self, workers: int = 2, deadline_s: float = 5.0, memory_mb: int = 1024) -> None:
        if workers < 1 or not deadline_s > 0 or memory_mb < 64:
            raise ValueError("a pool needs at least 1 worker, a positive deadline and 64 MB of memory a worker")
        self.workers, self.deadline_s, self.memory_mb = workers, deadline_s, memory_mb
        self.errors: Counter[str] = Counter()
        self.last_error = ""
        self._slots: list[_Worker | None] = [None] * workers
        self._lock = threading.Lock()  # one map at a time
        self._counting = threading.Lock()
        self._closed = False

    def map(self, function_path: str, jobs: Sequence[tuple]) -> list[Any | None]:
        """Run `function(*job)` for every job; results in order, None for a job that failed.

        Args:
            function_path: `package.module:function`, importable by the workers (they share this process's sys.path).
            jobs: positional arguments that JSON can carry. The result must be such a value too, and not None.

        Raises:
            VerifierError: the function cannot be imported, or the pool is closed.
        """
        with self._lock:
            if self._closed:
                raise VerifierError("this verifier pool is closed")
            queue = deque(enumerate(jobs))
            results: list[Any | None] = [None] * len(queue)
            failures: list[VerifierError] = []
            threads = [
                threading.Thread(target=self._serve, args=(slot, function_path, queue, results, failures), daemon=True)
                for slot in range(min(self.workers, len(queue)))
            ]
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            except BaseException:  # an interrupt must not leave threads talking to the workers
                queue.clear()
                self._stop_workers()
                raise
            if failures:
                raise failures[0]
            return results

    def close(self) -> None:
        """Kill the workers. Idempotent."""
        self._closed = True
        self._stop_workers()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _serve(self, slot: int, path: str, queue: deque, results: list, failures: list) -> None:
        while True:
            try:
                index, job = queue.popleft()
            except IndexError:
                return
            try:
                worker = self._ready_worker(slot, path)
            except VerifierError as error:
                failures.append(error)
                queue.clear()
                return
            results[index] = self._run(worker, path, job)

    def _run(self, worker: _Worker, path: str, job: tuple) -> Any | None:
        message = {"call": path, "arguments": list(job), "seconds": self.deadline_s}
        try:
            reply = worker.ask(message, self.deadline_s)
        except TimeoutError:
            return self._count("deadline", f"{path}: no result within {self.deadline_s:g} s")
        except ChildProcessError:
            return self._count("crashed", f"{path}: the worker died (crash, or more than {self.memory_mb} MB)")
        if reply.get("retire"):
            worker.stop()
        if "error" in reply:
            return self._count("raised", f"{path}: {reply['error']}")
        return reply["result"]

    def _ready_worker(self, slot: int, path: str) -> _Worker:
        worker = self._slots[slot]
        if worker is None or not worker.alive():  # also one that died idle: that is no job's fault
            if worker is not None:
                worker.stop()
            worker = self._slots[slot] = _Worker(self.memory_mb)
        if path not in worker.loaded:
            try:
                reply = worker.ask({"load": path, "seconds": LOAD_SECONDS}, LOAD_SECONDS)
            except (TimeoutError, ChildProcessError) as error:
                raise VerifierError(f"a worker with {self.memory_mb} MB could not load {path}: {error}") from error
            if "error" in reply:
                raise VerifierError(f"a worker could not load {path}: {reply['error']}")
            worker.loaded.add(path)
        return worker

    def _count(self, cause: str, message: str) -> None:
        with self._counting:
            self.errors[cause] += 1
            self.last_error = message

    def _stop_workers(self) -> None:
        for worker in self._slots:
            if worker is not None:
                worker.stop()


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, memory_mb: int) -> None:
        from agrpo.yaml_input import is_secret  # the worker itself has no need of it

        # The worker's end of the leash raises SIGIO when this end closes, which the kernel does however we die.
        # PR_SET_PDEATHSIG fires when the starting *thread* ends, and a busy worker would not see the end of its stdin.
        leash, self._leash = os.pipe()
        # Numerical libraries reserve memory for each thread; a fixed hash seed makes sympy's set order repeatable.
        # What a verifier does with model text is none of the keys' business: they stay here.
        inherited = {name: value for name, value in os.environ.items() if not is_secret(name)}
        environment = dict(inherited, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONHASHSEED="0")
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "reward_models.verifier", str(leash), str(memory_mb)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[leash],
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to handle, and a kill reaches what a verifier may have started
            )
        except BaseException:
            os.close(self._leash)
            raise
        finally:
            os.close(leash)
        self.loaded: set[str] = set()
        self._stopping = threading.Lock()

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, message: dict, seconds: float) -> dict:
        """The worker's reply. TimeoutError after `seconds`, ChildProcessError if it died; it is dead after both."""
        late = threading.Event()

        def end() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        line = b""
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (OSError, ValueError):  # a closed pipe: the worker is dead
            pass
        finally:
            timer.cancel()
            timer.join()  # after this the deadline has either struck or never will
        if late.is_set():
            self.stop()
            raise TimeoutError(f"no reply within {seconds:g} s")
        if not line.endswith(b"\n"):
            self.stop()
            raise ChildProcessError(f"the worker died with status {self._process.returncode}")
        return json.loads(line)

    def stop(self) -> None:
        with self._stopping:
            self._kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):  # unsent bytes for a dead worker
                    pipe.close()
            if self._leash >= 0:
                os.close(self._leash)
                self._leash = -1

    def _kill(self) -> None:
        if self._process.returncode is None:  # reaped means that the id may belong to someone else by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


_shared: tuple[int, VerifierPool] | None = None
_sharing = threading.Lock()


def shared_pool() -> VerifierPool:
    """The process's own pool with the default limits, started at first use and closed at exit."""
    global _shared
    with _sharing:
        if _shared is None or _shared[0] != os.getpid():  # after a fork the parent's workers are not ours to talk to
            pool = VerifierPool()
            atexit.register(pool.close)
            _shared = (os.getpid(), pool)
        return _shared[1]


# What follows runs in the worker.


def _work(leash: int, memory_mb: int) -> None:
    _die_with_parent(leash)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a verifier prints must not be taken for a reply
    for line in sys.stdin:
        message = json.loads(line)
        # A second guard, kept by the kernel: CPU time, should the parent be too busy to keep its deadline.
        soft = math.ceil(time.process_time() + 2 * message["seconds"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            if "load" in message:
                _function(message["load"])
                reply = {"result": True}
            else:
                reply = {"result": _function(message["call"])(*message["arguments"])}
            text = json.dumps(reply)
        except MemoryError:
            os._exit(1)  # nothing in this process can be trusted now
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:1000]}
            text = json.dumps(reply)
        if _resident_bytes() > memory_mb << 19:  # half the limit: what stays behind must not fail a later, honest job
            text = json.dumps(reply | {"retire": True})
        replies.write(text + "\n")
        replies.flush()


def _resident_bytes() -> int:
    """What this process holds now. Not ru_maxrss: that starts at the parent's size, here a whole trainer's."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:  # no Linux: RLIMIT_AS alone stands guard
        return 0


def _die_with_parent(leash: int) -> None:
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(leash, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(leash, fcntl.F_SETFL, fcntl.fcntl(leash, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([leash], [], [], 0)[0]:  # the parent died before the leash was on
        os._exit(0)


@functools.cache
def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    _work(int(sys.argv[1]), int(sys.argv[2]))

"""Calls of code that may raise or hang: each in a thread with a deadline, several at a time."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Failed:
    """Why a call has no result."""

    reason: str
    hung: bool = False  # its thread goes on: Python cannot end it


def call_together(calls: Sequence[Callable[[], T]], timeout_s: float, concurrency: int) -> list[T | Failed]:
    """The result of each call, in order, or why there is none.

    Args:
        timeout_s: of one call. A thread that takes longer is left behind, and does not keep the process alive.
        concurrency: calls that run at the same time.
    """
    outcomes: list[T | Failed | None] = [None] * len(calls)
    done: queue.SimpleQueue[tuple[int, T | Failed]] = queue.SimpleQueue()
    waiting, deadlines = deque(range(len(calls))), {}

    def run(number: int) -> None:
        try:
            done.put((number, calls[number]()))
        except BaseException as error:  # a user's code: a SystemExit of its own must not end a thread unheard
            done.put((number, Failed(f"{type(error).__name__}: {error}")))

    while waiting or deadlines:
        while waiting and len(deadlines) < concurrency:
            number = waiting.popleft()
            deadlines[number] = time.monotonic() + timeout_s
            threading.Thread(target=run, args=(number,), daemon=True).start()
        try:
            number, outcome = done.get(timeout=max(0.0, min(deadlines.values()) - time.monotonic()))
        except queue.Empty:
            late = min(deadlines, key=deadlines.__getitem__)
            number, outcome = late, Failed(f"no answer within {timeout_s:g} s", hung=True)
        if deadlines.pop(number, None) is not None:  # else it is late, and given up already
            outcomes[number] = outcome
    return outcomes

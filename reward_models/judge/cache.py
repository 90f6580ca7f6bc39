"""Answers on disk: a file of JSON lines that several processes and several runs share."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any


class AnswerCache:
    """Answers by key. Where two processes wrote the same key, the line that came first counts for everyone.

    A line is appended under a lock. One that a crash cut off is skipped, and costs no other. In memory are places, not
    answers. The file may be deleted between runs; to change a judge's mind, delete it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._path, self._read = path, 0
        self._places: dict[str, tuple[int, int]] = {}  # key → (offset, bytes)

    def refresh(self) -> None:
        """Learn what others have added since."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                row = _row(line)
                if row is not None:
                    self._places.setdefault(row["key"], (self._read, len(line)))
                self._read += len(line)

    def get(self, key: str) -> dict[str, Any] | None:
        if key not in self._places:
            return None
        offset, length = self._places[key]
        row = _row(os.pread(self._file, length, offset))
        return row if row is not None and row["key"] == key else None  # None: someone changed the file

    def put(self, key: str, answer: dict[str, Any]) -> None:
        line = json.dumps({"key": key, **answer}).encode() + b"\n"
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                line = b"\n" + line  # a writer died within its line
            while line:
                line = line[os.write(self._file, line) :]
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("key"), str) else None

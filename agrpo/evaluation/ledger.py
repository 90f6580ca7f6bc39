"""Results that survive an interruption: a file of lines, each checked when it is read again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agrpo.reporting.files import to_json
from agrpo.types import InputError

_CHECK = "sha256"  # of a line's other fields


class Ledger:
    """One evaluation's results by prompt, in `results.jsonl`: the first line says of what, then one line a prompt.

    A line that was cut off or changed counts as not there, and its prompt is measured again.

    Args:
        path: the file; made on the first `append`.
        identity: everything that the numbers depend on.

    Raises:
        InputError: the file holds another evaluation.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, json.loads(to_json(identity))
        self.rows: dict[int, dict[str, Any]] = {}
        self.damaged = 0  # lines that were there and did not count
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        checked = [_verified(line) for line in lines]
        if checked:
            self._require_same(checked[0])
        for row in checked[1:]:
            if row is None:
                self.damaged += 1
            else:
                self.rows[row["slot"]] = row

    def _require_same(self, header: Mapping[str, Any] | None) -> None:
        found = header and header.get("identity")
        if not isinstance(found, dict):
            raise InputError(f"{self.path}: its first line does not say what was measured; give another --out")
        keys = dict.fromkeys([*self.identity, *found])
        differ = [key for key in keys if found.get(key) != self.identity.get(key)]
        if differ:
            raise InputError(
                f"{self.path}: holds another evaluation ({', '.join(differ)} differ); give another --out, or"
                " --again to start over"
            )

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, each with its `slot`, whole on disk when this returns."""
        rows = [json.loads(to_json(row)) for row in rows]
        new = not self.path.exists() or self.path.stat().st_size == 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if not new:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # a writer died within its line
            header = [{"identity": self.identity}] if new else []
            file.writelines(f"{_signed(row)}\n".encode() for row in [*header, *rows])
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {row["slot"]: row for row in rows}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a finished or unfinished evaluation, by slot.

    Raises:
        InputError: it is no such file, or a line of it is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        row = _verified(line)
        if row is None:
            raise InputError(f"{path}:{number}: is cut off or was changed; run the evaluation again: it mends the file")
        rows.append(row)
    if len(rows) < 2 or "identity" not in rows[0]:
        raise InputError(f"{path}: holds no results of agrpo eval")
    by_slot = {row["slot"]: row for row in rows[1:]}
    return [by_slot[slot] for slot in sorted(by_slot)]


def _signed(row: Mapping[str, Any]) -> str:
    return to_json({**row, _CHECK: _digest(row)})


def _verified(line: str) -> dict[str, Any] | None:
    """The row of a line without its check, or None where it is not what was written."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or row.pop(_CHECK, None) != _digest(row):
        return None
    return row


def _digest(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]

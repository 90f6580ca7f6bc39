"""JSON on disk, safe against non-finite numbers, model-written text and a machine that stops mid-write."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Series = tuple[list[int], list[float]]  # steps counted from 1, values


def to_json(value: Any) -> str:
    """One line of strict JSON. NaN and infinities become null; tensors and arrays become numbers and lists.

    Text is escaped to ASCII: a completion may hold U+2028 or half a surrogate pair, and would break a reader of lines.
    """
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # torch and numpy, scalars too, without importing either
        return _plain(value.tolist())
    return value


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of lines, none where there is no file. A line cut off while it was written is skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                yield row


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; empty where there is no file, or it is no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def read_series(path: Path) -> dict[str, Series]:
    """Each metric's finite values and their steps."""
    series: dict[str, Series] = {}
    for row in read_jsonl(path):
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "time_s"):
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"] + 1)
                values.append(value)
    return series


def replace(path: Path, chunks: Iterable[str]) -> None:
    """Writes a file whole or not at all: a reader, or a crash, meets the old text or the new, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

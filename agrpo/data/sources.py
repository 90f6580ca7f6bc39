"""Where rows come from: local files, the Hub, reasoning-gym's tasks, a function of one's own.

Rows keep the place they stand at, so that whatever is wrong with one later can be said with file and line. pyarrow,
datasets and reasoning_gym are imported where they are needed: a mistyped path is refused within milliseconds.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import gzip
import importlib
import inspect
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from agrpo.data.records import SKIP_HINT, DataError, OnBadRow, Records, Rows

Row = tuple[str, dict[str, Any]]
Refuse = Callable[[DataError], None]  # raises, or notes the row as skipped
SPLITS = ("train", "validation", "test")


def load_rows(
    *,
    source: str | None = None,
    path: str | Path | None = None,
    split: str = "train",
    parameters: Mapping[str, Any] | None = None,
    revision: str | None = None,
    on_bad_row: OnBadRow = "error",
) -> Rows:
    """All rows of a source, each with its location.

    Args:
        source: a Hub id, `reasoning_gym:<task>` or `python:<module>:<function>`.
        path: .json (a list of objects, or {"data": list}), .jsonl, .csv, .parquet, all but the last also .gz; or a
            folder of such files: those whose names begin with the split, or all if none begins with any split's name.
        split: of a Hub data set; handed to a function; without effect on a single file.
        parameters: of a task or function, or further arguments of `datasets.load_dataset`.

    Raises:
        DataError: says file, row and the mend.
    """
    parameters = dict(parameters or {})
    if (source is None) == (path is None):
        raise DataError("data: give exactly one of source (a Hub id or a task) and path (a local file)")
    skipped: list[str] = []

    def refuse(error: DataError) -> None:
        if on_bad_row == "error":
            raise DataError(f"{error} {SKIP_HINT}")
        skipped.append(str(error))

    if path is not None:
        if parameters:
            raise DataError(
                f"{path}: a local file takes no parameters ({', '.join(parameters)}); remove data.parameters"
            )
        rows = _local(Path(path), split, refuse)
    else:
        rows = _from_source(str(source), split, parameters, revision, refuse)
    items = tuple(rows)
    if not items:
        problem = (
            f"no usable row of {len(skipped)}; the first: {skipped[0]}"
            if skipped
            else "holds no rows; is it the right one?"
        )
        raise DataError(f"{path or source}: {problem}")
    return Records(items, tuple(skipped))


def _from_source(
    source: str, split: str, parameters: dict[str, Any], revision: str | None, refuse: Refuse
) -> Iterator[Row]:
    kind, colon, name = source.partition(":")
    if revision is not None and colon:
        raise DataError(f"{source}: a revision belongs to a Hub id; remove data.revision")
    if kind == "reasoning_gym" and name:
        return _reasoning_gym(source, name, split, parameters)
    if kind == "python" and name.count(":") == 1:
        return _function(source, name, split, parameters, refuse)
    if colon:
        raise DataError(f"{source}: unknown source; write reasoning_gym:<task>, python:<module>:<function> or a Hub id")
    if Path(source).suffix in (*_READERS, ".gz") or Path(source).is_file():
        raise DataError(f"{source}: is a local file, not a source; write data.path: {source}")
    return _hub(source, split, parameters, revision)


# Local files.


def _local(path: Path, split: str, refuse: Refuse) -> Iterator[Row]:
    for file in _files(path, split):
        try:
            yield from _reader(file)(file, refuse)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{file}: not a whole gzip file ({error}); copy it again or drop the .gz ending") from None
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read: {error.strerror or error}; check the file and its permissions"
            ) from None


def _files(path: Path, split: str) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _ending(file) in _READERS)
        if not files:
            raise DataError(f"{path}: no {', '.join(_READERS)} in this folder; point data.path at a file")
        if any(file.name.startswith(SPLITS) for file in files):
            names = ", ".join(file.name for file in files)
            files = [file for file in files if file.name.startswith(split)]
            if not files:
                raise DataError(f"{path}: no file begins with the split {split!r}; it holds {names}: set data.split")
        return files
    if path.exists():
        return [path]
    if not path.parent.is_dir():
        raise DataError(f"{path}: no such file, and no folder {path.parent}; correct data.path")
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1, cutoff=0.5)
    mend = f"did you mean {path.parent / near[0]}?" if near else "correct data.path"
    raise DataError(f"{path}: no such file; {mend}")


def _ending(path: Path) -> str:
    """.jsonl of both a.jsonl and a.jsonl.gz."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix == ".gz" and inner != ".parquet" else suffix


def _reader(path: Path) -> Callable[[Path, Refuse], Iterator[Row]]:
    try:
        return _READERS[_ending(path)]
    except KeyError:
        known = f"{', '.join(_READERS)}, all but .parquet also with .gz"
        raise DataError(f"{path}: cannot read this kind of file; known endings: {known}") from None


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_jsonl(path: Path, refuse: Refuse) -> Iterator[Row]:
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            location = f"{path}:{number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                refuse(_undecodable(location, error))
            except json.JSONDecodeError as error:
                refuse(
                    DataError(
                        f"{location}: column {error.colno}: not JSON: {error.msg}; each line holds one whole object"
                    )
                )
            else:
                if isinstance(row, dict):
                    yield location, row
                else:
                    refuse(
                        _no_object(location, row, "a file that is one JSON list is named .json" if number == 1 else "")
                    )


def _read_json(path: Path, refuse: Refuse) -> Iterator[Row]:
    text = _text(path)
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        mend = "name it .jsonl if each line is an object" if error.msg == "Extra data" else "correct the file there"
        raise DataError(f"{path}:{error.lineno}: column {error.colno}: not JSON: {error.msg}; {mend}") from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        there = f"an object with {', '.join(rows)}" if isinstance(rows, dict) else f"a {type(rows).__name__}"
        raise DataError(f'{path}: holds {there}; a .json file is a list of objects, or {{"data": list of objects}}')
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield f"{path} row {number}", row
        else:
            refuse(_no_object(f"{path} row {number}", row))


def _read_csv(path: Path, refuse: Refuse) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a conversation is longer than the module's 128 KiB
    lines = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise DataError(
                f"{path}:1: the header {', '.join(header)} has a name twice or an empty one; name each column"
            )
        begins = lines.line_num + 1
        for fields in lines:
            location, begins = f"{path}:{begins}", lines.line_num + 1
            if not fields:
                continue
            if len(fields) == len(header):
                yield location, dict(zip(header, fields, strict=True))
            else:
                problem = f"{len(fields)} fields where the header names {len(header)} ({', '.join(header)})"
                refuse(DataError(f"{location}: {problem}; put text with commas or line breaks in double quotes"))
    except csv.Error as error:
        raise DataError(
            f"{path}:{lines.line_num}: not CSV: {error}; close the quotes, and double those inside text"
        ) from None


def _read_parquet(path: Path, refuse: Refuse) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: not a whole Parquet file ({str(error).splitlines()[0]}); write or copy it again"
        ) from None


_READERS: dict[str, Callable[[Path, Refuse], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _text(path: Path) -> str:
    with _open(path) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _undecodable(f"{path}:{line}", error) from None


def _undecodable(location: str, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    mend = "convert the file, for example with iconv -f latin1 -t utf-8"
    return DataError(f"{location}: the byte 0x{byte:02x} is not UTF-8; {mend}")


def _no_object(location: str, row: Any, hint: str = "") -> DataError:
    text = json.dumps(row, ensure_ascii=False)
    mend = 'a row is an object such as {"prompt": "…"}' + (f"; {hint}" if hint else "")
    return DataError(f"{location}: {text if len(text) < 40 else text[:37] + '…'} is not an object; {mend}")


# Sources that are not files.


def _reasoning_gym(source: str, task: str, split: str, parameters: dict[str, Any]) -> Iterator[Row]:
    """question, answer, metadata, and the whole entry as JSON, which is what the task's own verifier scores against."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise DataError(f"{source}: reasoning_gym is not installed; pip install reasoning-gym") from None
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, 1)
        mend = f"did you mean reasoning_gym:{near[0]}?" if near else f"there are {', '.join(sorted(DATASETS))}"
        raise DataError(f"{source}: no such task; {mend}")
    if "seed" not in parameters and split != "train":
        mend = f"give data.parameters a seed that training does not use, for its {split} rows"
        raise DataError(f"{source}: a reasoning_gym task has no splits; {mend}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    _check_parameters(source, parameters, known)
    try:
        entries = create_dataset(task, **{"seed": 0, **parameters})
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(f"{source}: parameters {parameters}: {error}; correct data.parameters") from None
    for number, entry in enumerate(entries, 1):
        row = {key: entry[key] for key in ("question", "answer", "metadata")}
        yield f"{source} row {number}", {**row, "entry": json.dumps(entry)}


def _function(source: str, name: str, split: str, parameters: dict[str, Any], refuse: Refuse) -> Iterator[Row]:
    module_name, function_name = name.split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise DataError(f"{source}: no module named {error.name}; is its folder on PYTHONPATH?") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(function_name, functions, 1)
        mend = f"did you mean {near[0]}?" if near else f"it has {', '.join(functions)}"
        raise DataError(f"{source}: {module_name} has no function {function_name}; {mend}")
    signature = inspect.signature(function)
    if all(p.kind is not p.VAR_KEYWORD for p in signature.parameters.values()):
        if "split" not in signature.parameters:
            raise DataError(f"{source}: takes no split; add the argument split: every source has one")
        _check_parameters(source, parameters, [key for key in signature.parameters if key != "split"])
    try:
        signature.bind(split=split, **parameters)
    except TypeError as error:
        raise DataError(f"{source}: {error}; correct data.parameters") from None
    try:
        rows: Iterable[Any] = function(split=split, **parameters)
        for number, row in enumerate(rows, 1):
            location = f"{source} row {number}"
            if isinstance(row, Mapping):
                yield location, dict(row)
            else:
                refuse(DataError(f"{location}: {type(row).__name__} is not an object; the function returns dicts"))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{source}: {error}") from error


def _check_parameters(source: str, parameters: dict[str, Any], known: list[str]) -> None:
    for key in parameters:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            mend = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise DataError(f"{source}: data.parameters: unknown parameter {key!r}; {mend}")


def _hub(source: str, split: str, parameters: dict[str, Any], revision: str | None) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: the Hub needs the package datasets; pip install datasets, or use data.path"
        ) from None
    try:
        rows = datasets.load_dataset(source, split=split, revision=revision, **parameters)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{source}: not on the Hub, or not for you ({error}); check the name, or log in with hf auth login"
        ) from None
    except ConnectionError as error:
        mend = "check the network, or download the data elsewhere and use data.path"
        raise DataError(f"{source}: the Hub cannot be reached ({error}); {mend}") from None
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{source}: {error}; check data.split ({split}), data.revision and data.parameters") from None
    for number, row in enumerate(rows, 1):
        yield f"{source}[{split}] row {number}", dict(row)

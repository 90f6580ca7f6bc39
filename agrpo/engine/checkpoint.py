"""Checkpoints that are whole or absent: snapshot, written aside, hashed, then renamed into place.

checkpoints/step-000050/  after 50 steps; step-000050.1: and one update of the next step's rollout
    engine/             DeepSpeed's weights and optimiser
    rank-00000.json     what adapts, of each rank: values, and the places of the tensors in
    rank-00000.safetensors
    state.json          step, processes, reference, configuration, score
    manifest.json       size and SHA-256 of every file, written last
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError

from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.types import InputError

MANIFEST = "manifest.json"
STATE = "state.json"
_TAG = "engine"
_NAME = re.compile(r"^step-(\d{6,})(?:\.(\d+))?$")
_TENSOR = "$tensor"

Facts = dict[str, dict[str, Any]]  # size and sha256 of each file


class Stateful(Protocol):
    """What adapts. The state may nest dicts with text keys, lists, tensors and JSON values; tuples become lists."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


class CheckpointError(InputError):
    """A checkpoint that cannot be used: the message says which file and what to do."""


# Writing


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `newest` ones, and the one with the best score if `best` says which end that is."""

    newest: int
    best: Callable[[list[float]], float] | None = None  # max or min


@dataclass
class _Writing:
    partial: Path
    final: Path
    thread: threading.Thread
    facts: Facts
    error: str | None = None


class Writer:
    """Writes the checkpoints of a run into `folder`. Every rank calls the same methods in the same order.

    With `asynchronous`, `save` returns once the state is copied to memory, and a thread writes it; `settle` puts it
    into place. Between the two it does not exist.
    """

    def __init__(self, folder: Path, keep: Keep, asynchronous: bool = False) -> None:
        self.folder, self._keep, self._asynchronous = folder, keep, asynchronous
        self._writing: _Writing | None = None

    @property
    def pending(self) -> bool:
        """Is a checkpoint not in place yet? The same on every rank."""
        return self._writing is not None

    @property
    def busy(self) -> bool:
        """Is this rank's thread still writing?"""
        return self._writing is not None and self._writing.thread.is_alive()

    def save(
        self,
        step: int,
        engine: HybridEngine,
        own: Mapping[str, Any],
        shared: Mapping[str, Any],
        *,
        update: int = 0,
        score: float | None = None,
    ) -> str | None:
        """Write `folder`/step-000050 after 50 steps, then drop what need not stay.

        Args:
            own: state of this rank, tensors included.
            shared: JSON values that are the same on every rank.
            update: updates of the next step's rollout that are done too.
            score: for the best.

        Returns:
            Why this checkpoint, or an asynchronous one before it, could not be written; earlier ones are as they were.
        """
        error = self.settle()
        name = f"step-{step:06d}" + (f".{update}" if update else "")
        final, partial = self.folder / name, self.folder / f".{name}.partial"
        prepared = None
        if distributed.rank() == 0:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / _TAG).mkdir(parents=True)
            except OSError as problem:
                prepared = f"{partial}: {problem.strerror}"
        prepared = distributed.gather_objects(prepared)[0]
        if prepared:
            return prepared
        files = {f"{_TAG}/{file}": content for file, content in engine.state_files(str(partial), _TAG).items()}
        values, tensors = _apart(own)
        rank = f"rank-{distributed.rank():05d}"
        files[f"{rank}.json"] = json.dumps(values, indent=1).encode()
        files[f"{rank}.safetensors"] = safetensors.torch.save(tensors)
        if distributed.rank() == 0:
            world = distributed.world()
            whole = {"step": step, "update": update, "world_size": world, "score": score, **shared}
            files[STATE] = json.dumps(whole, indent=1).encode()
        writing = _Writing(partial, final, threading.Thread(), {})
        writing.thread = threading.Thread(target=_write, args=(writing, files), name="checkpoint")
        self._writing = writing
        writing.thread.start()
        return error if self._asynchronous else self.settle() or error

    def settle(self) -> str | None:
        """Wait for the checkpoint that is being written and put it into place; why that failed, or None."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        writing.thread.join()
        parts = distributed.gather_objects((writing.facts, writing.error))
        error = next((problem for _, problem in parts if problem), None)
        if distributed.rank() == 0:
            try:
                if error is None:
                    self._place(writing, {name: fact for facts, _ in parts for name, fact in facts.items()})
            except OSError as problem:
                error = f"{writing.partial}: {problem.strerror}"
            if error is not None:
                shutil.rmtree(writing.partial, ignore_errors=True)
        return distributed.gather_objects(error)[0]

    def _place(self, writing: _Writing, facts: Facts) -> None:
        partial, final = writing.partial, writing.final
        for path in _files(partial):  # what DeepSpeed offloads
            facts.setdefault(str(path.relative_to(partial)), _facts(path))
        (partial / MANIFEST).write_text(_manifest(facts), encoding="utf-8")
        _flush(partial / MANIFEST)
        for inner in [path for path in partial.rglob("*") if path.is_dir()]:
            _flush(inner)
        _flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(self.folder)
        self._retire()

    def _retire(self) -> None:
        """Drop what need not stay."""
        saved = _saved(self.folder)
        stay = set(saved[-self._keep.newest :])
        if self._keep.best is not None:
            scores = {path: score for path in saved if (score := _score(path)) is not None}
            if scores:
                best = self._keep.best(list(scores.values()))
                stay.add(max(path for path, score in scores.items() if score == best))
        for old in set(saved) - stay:
            retired = old.with_name(f".{old.name}.retired")  # so that a crash leaves no half of it under its name
            old.rename(retired)
            shutil.rmtree(retired, ignore_errors=True)


def _write(writing: _Writing, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = writing.partial / name
        try:
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            writing.error = f"{path}: {error.strerror}"
            return
        writing.facts[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _manifest(facts: Facts) -> str:
    """Its own digest included: a changed byte shows wherever it is."""
    files = json.dumps(facts, sort_keys=True)
    return json.dumps({"files": json.loads(files), "sha256": hashlib.sha256(files.encode()).hexdigest()}, indent=1)


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _saved(folder: Path) -> list[Path]:
    """Checkpoints by name, from old to new."""
    named = [(match, path) for path in folder.glob("step-*") if (match := _NAME.match(path.name))]
    return [path for match, path in sorted(named, key=lambda one: (int(one[0][1]), int(one[0][2] or 0)))]


def _score(path: Path) -> float | None:
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8"))["score"]
    except (OSError, ValueError, KeyError):
        return None


def remove_leftovers(folder: Path) -> list[str]:
    """Drop what a run that was killed left half written; its names."""
    found = sorted(path for path in folder.glob(".step-*") if path.suffix in (".partial", ".retired"))
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found]


# Reading


@dataclass(frozen=True)
class Found:
    """A whole checkpoint and its shared state."""

    path: Path
    state: dict[str, Any]


def newest(folder: Path) -> tuple[Found | None, list[str]]:
    """The newest whole checkpoint, if there is one, and what is wrong with each that was passed over."""
    damaged: list[str] = []
    for path in reversed(_saved(folder)):
        why = why_damaged(path)
        if why is None:
            return Found(path, json.loads((path / STATE).read_text(encoding="utf-8"))), damaged
        damaged.append(why)
    return None, damaged


def set_aside(folder: Path) -> None:
    """Give every damaged checkpoint that is newer than the newest whole one a name that no checkpoint has."""
    for path in reversed(_saved(folder)):
        if why_damaged(path) is None:
            return
        shutil.rmtree(path.with_name(f"damaged-{path.name}"), ignore_errors=True)
        path.rename(path.with_name(f"damaged-{path.name}"))


def why_damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None when its files are those of its manifest, bit for bit."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if text != _manifest(files):
            return f"{path / MANIFEST}: has been changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path / MANIFEST}: {error}"
    there = {str(file.relative_to(path)) for file in _files(path)} - {MANIFEST}
    if strange := sorted(there - files.keys()):
        return f"{path / strange[0]}: is not in the manifest"
    for name, facts in files.items():
        if name not in there or (path / name).is_symlink() or _facts(path / name) != facts:
            return f"{path / name}: is missing or is not what the manifest says"
    return None


def require_world(path: Path, state: Mapping[str, Any]) -> None:
    """
    Raises:
        CheckpointError: the checkpoint is of another number of processes.
    """
    if state["world_size"] != distributed.world():
        raise CheckpointError(
            f"{path}: was written by {state['world_size']} processes and this job has {distributed.world()}:"
            f" resume with NPROC={state['world_size']} in all, or start over with checkpoint.resume=false"
        )


def load(path: Path, state: Mapping[str, Any], engine: HybridEngine, tracked: Mapping[str, Stateful]) -> None:
    """Bring engine and tracked objects back to where the checkpoint was taken. Every rank must call it.

    Raises:
        CheckpointError: it is of another number of processes, or holds what is not loaded from anyone.
    """
    require_world(path, state)
    engine.load_state(str(path), _TAG)
    rank = path / f"rank-{distributed.rank():05d}"
    try:
        values = json.loads(rank.with_suffix(".json").read_text(encoding="utf-8"))
        own = _together(values, safetensors.torch.load_file(rank.with_suffix(".safetensors")))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{rank}: cannot be read: {error}") from None
    if missing := tracked.keys() - own.keys():
        raise CheckpointError(
            f"{path}: knows nothing of {', '.join(sorted(missing))}, which this version tracks: finish the run with the"
            " version that began it, or start over with checkpoint.resume=false"
        )
    for name, one in tracked.items():
        one.load_state_dict(own[name])


def _apart(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """JSON values with the names of the tensors that stood among them, and those tensors."""
    tensors: dict[str, torch.Tensor] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().clone().contiguous()
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            return {key: visit(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [visit(item) for item in value]
        return value

    return visit(state), tensors


def _together(values: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(values, dict):
        if values.keys() == {_TENSOR}:
            return tensors[values[_TENSOR]]
        return {key: _together(item, tensors) for key, item in values.items()}
    return [_together(item, tensors) for item in values] if isinstance(values, list) else values

"""Checkpoints that are whole or absent: written aside, hashed, then renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.types import InputError

MANIFEST = "manifest.json"
_TAG = "engine"


class Stateful(Protocol):
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


class CheckpointError(InputError):
    """A checkpoint that cannot be used: the message says which file and what to do."""


def save(folder: Path, step: int, engine: HybridEngine, state: Mapping[str, Any], keep: int) -> Path:
    """Write `folder`/step-000050 after 50 steps, then drop all but the newest `keep`. Every rank must call it.

    Args:
        state: JSON values that are the same on every rank.
    """
    final = folder / f"step-{step:06d}"
    partial = folder / f".{final.name}.partial"
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    engine.save_state(str(partial), _TAG)
    distributed.barrier()
    if distributed.rank() == 0:
        whole = {"step": step, "world_size": distributed.world(), **state}
        (partial / "state.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
        files = {str(path.relative_to(partial)): _facts(path) for path in sorted(partial.rglob("*")) if path.is_file()}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
        _flush(partial / MANIFEST)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(folder)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return final


def _facts(path: Path) -> dict[str, Any]:
    _flush(path)
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state, or None. A damaged one is passed over for the one before it."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if why_damaged(path) is None:
            return path, json.loads((path / "state.json").read_text(encoding="utf-8"))
    return None


def why_damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is as its manifest says."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        return f"{path / MANIFEST}: {error}"
    for name, facts in files.items():
        if not (path / name).is_file() or _facts(path / name) != facts:
            return f"{path / name}: is missing or is not what the manifest says"
    return None


def load(path: Path, state: Mapping[str, Any], engine: HybridEngine, tracked: Mapping[str, Stateful]) -> None:
    """Bring engine and tracked objects back to where the checkpoint was taken. Every rank must call it."""
    if state["world_size"] != distributed.world():
        raise CheckpointError(
            f"{path}: was written by {state['world_size']} processes and this job has {distributed.world()}:"
            f" resume with NPROC={state['world_size']}, or start over with checkpoint.resume=false"
        )
    engine.load_state(str(path), _TAG)
    for name, one in tracked.items():
        one.load_state_dict(state[name])

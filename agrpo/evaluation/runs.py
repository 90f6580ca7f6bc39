"""Where a run keeps its model, and what is known of it there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from agrpo.reporting.files import read_jsonl
from agrpo.types import InputError
from agrpo.yaml_input import read_yaml

_STAGES = ("agrpo", "sft")  # the later one's policy is the run's
_WEIGHTS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def find_model(name: str) -> str:
    """A folder of a model, or a Hub id, from what a person types: a model's folder, a stage's, a run's, or the id.

    Raises:
        InputError: a folder without a policy's model; the message says what is missing.
    """
    folder = Path(name)
    if not folder.exists():
        if name.count("/") == 1 and not name.startswith((".", "/")):
            return name
        raise InputError(f"{name}: no such folder; give a run's, a model's, or a Hub id such as owner/name")
    if (folder / "config.json").is_file():
        return str(folder)
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{name}: is an adapter, not a whole model: agrpo merge {name} OUT makes one")
    for candidate in (folder / "model", *(folder / stage / "model" for stage in _STAGES)):
        if (candidate / "config.json").is_file():
            return str(candidate)
    if any((folder / stage).is_dir() for stage in _STAGES) or (folder / "config.yaml").is_file():
        raise InputError(
            f"{name}: the run has no model/ yet: run its stage again to finish it, or agrpo merge {name} OUT"
            " takes its newest checkpoint"
        )
    raise InputError(f"{name}: holds neither a model (config.json) nor a run of agrpo (sft/, agrpo/)")


def stage_directory(model: str) -> Path | None:
    """The directory of the stage that made the model, None of another model."""
    folder = Path(model).resolve().parent
    return folder if Path(model).name == "model" and (folder / "config.yaml").is_file() else None


def stage_config(model: str) -> dict[str, Any] | None:
    """The resolved configuration under which the model was trained here, or None."""
    stage = stage_directory(model)
    return None if stage is None else read_yaml(stage / "config.yaml")


def spoken_to_in_turns(model: str) -> bool | None:
    """Were the prompts of its training conversations, or plain strings? None where nothing tells."""
    stage = stage_directory(model)
    for name, key in (("samples.jsonl", "prompt"), ("evaluation-test.jsonl", "text")):
        for row in read_jsonl(stage / name) if stage is not None else ():
            if key in row:
                return not isinstance(row[key], str)
    return None


def fingerprint(model: str) -> str:
    """What identifies a model's weights and tokenizer: a digest of its files, or the commit of a Hub id."""
    folder = Path(model)
    if not folder.is_dir():
        from transformers import AutoConfig

        return str(getattr(AutoConfig.from_pretrained(model), "_commit_hash", None))
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _WEIGHTS:
            with path.open("rb") as file:
                digest.update(json.dumps([path.name, hashlib.file_digest(file, "sha256").hexdigest()]).encode())
    return digest.hexdigest()[:16]

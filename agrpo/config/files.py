"""A configuration file with those that it extends, and with TRL's flat keys put where they belong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from agrpo.config import trl
from agrpo.config.methods import METHODS, PREFERENCE_METHODS
from agrpo.config.stages import STAGES
from agrpo.places import configuration
from agrpo.yaml_input import ConfigError, merge, read_yaml

Note = Callable[[str], None]


def presets(stage: str) -> dict[str, dict[str, Any]]:
    """The methods that a stage can name, with their settings."""
    return {"agrpo": METHODS, "reward": PREFERENCE_METHODS}.get(stage, {})


def read_config(path: Path, stage: str | None = None, note: Note = lambda text: None) -> dict[str, Any]:
    """The sections in a file, laid over those of the files that it `extends`, one path or several, relative to it.

    A later file wins over an earlier one, and the file itself over all. Where it names a method, that method's settings
    win over the extended files too.

    Args:
        stage: whose keys TRL's stand for; None leaves them as they are.
        note: is told of each of TRL's keys, and what stands for it here; and of a file of agrpo's own that is read.

    Raises:
        ConfigError: a file is missing, or extends itself.
    """
    values: dict[str, Any] = {}
    found = configuration(path)
    if found != path:
        note(f"{path} is not here; reading agrpo's own: {found}")
    for file in _chain(found, ()):
        own = {key: value for key, value in read_yaml(file).items() if key != "extends"}
        if stage is not None:
            own = trl.translate(own, stage, str(file), values, lambda text: note(f"TRL: {text}"))
            settings = presets(stage).get(str(own.get("method")), {})
            values = _without(values, settings)
        values = merge(values, own)
    return values


def stage_of(path: Path) -> str:
    """The stage of a configuration: its file's name up to a hyphen if that is one, else by the sections that it has."""
    first = path.stem.split("-")[0]
    if first in STAGES:
        return first
    keys = read_config(path).keys()
    if "rewards" in keys:
        return "agrpo" if "training" in keys else "preferences"
    only = {name: STAGES[name].model_fields.keys() for name in ("sft", "reward")}
    fitting = [name for name, fields in only.items() if keys <= fields]
    if len(fitting) == 1:
        return fitting[0]
    raise ConfigError(f"{path}: whose configuration is it? Say --stage {'|'.join(STAGES)}")


def _chain(path: Path, above: tuple[Path, ...]) -> list[Path]:
    """Every file once: those that a file extends before it."""
    here = path.resolve()
    if here in above:
        circle = " → ".join(file.name for file in (*above[above.index(here) :], here))
        raise ConfigError(f"{above[-1]}: extends: goes round in a circle ({circle}); leave one of them out")
    if above and not path.is_file():
        raise ConfigError(
            f"{above[-1]}: extends: {path} does not exist; the path is relative to the file that names it"
        )
    named = read_yaml(path).get("extends", [])
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
        raise ConfigError(f"{path}: extends: give a path, or a list of paths, to YAML files, got {named!r}")
    found: list[Path] = []
    for one in named:
        found += [
            file for file in _chain(path.parent / one, (*above, here)) if file.resolve() not in map(Path.resolve, found)
        ]
    return [*found, path]


def _without(values: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The values but for those that the settings have too."""
    left = {}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            left[key] = _without(value, settings[key])
        elif key not in settings:
            left[key] = value
    return left

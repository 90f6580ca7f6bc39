"""From YAML and the command line to a resolved configuration."""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agrpo.config import trl
from agrpo.config.common import RunConfig
from agrpo.config.files import Note, presets, read_config
from agrpo.config.rewards import RewardSpec
from agrpo.config.stages import STAGES, PolicyConfig, PreferencesConfig, SFTConfig
from agrpo.places import own_folder
from agrpo.yaml_input import ConfigError, explain, merge, set_path, to_yaml


def load_config(
    stage: str,
    path: Path | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    note: Note = lambda text: None,
) -> Any:
    """The resolved configuration of a stage.

    Args:
        stage: sft, preferences, reward or agrpo.
        path: a YAML file; None takes the quickstart's.
        overrides: `key.path=value` strings, the value read as YAML; they win over the file.
        note: is told of each of TRL's keys, what stands for it, and of a file of agrpo's own that is read.

    Raises:
        ConfigError: says file, key and the mend.
    """
    if stage == "preferences" and path is None:
        raise ConfigError(
            "preferences: has no default: give --config FILE, such as configs/smollm2-135m/preferences.yaml"
        )
    path = path or own_folder("configs") / "quickstart" / f"{stage}.yaml"
    return resolve(stage, read_config(path, stage, note), path, overrides, note=note)


def resolve(
    stage: str,
    values: dict[str, Any],
    path: Path,
    overrides: Sequence[str] = (),
    *,
    models_exist: bool = True,
    note: Note = lambda text: None,
) -> Any:
    """The same of a file's values that have been read.

    Args:
        path: where the values come from, for errors.
        models_exist: refuse a model of a run that no stage has made yet.
        note: is told of each of TRL's keys, and what stands for it.
    """
    values = _with_method(stage, values, overrides)
    flat: dict[str, Any] = {}
    for override in overrides:
        is_flat = trl.is_flat(override.partition("=")[0], stage)
        set_path(flat if is_flat else values, override)
    values = merge(values, trl.translate(flat, stage, "command line", values, lambda text: note(f"TRL: {text}")))
    values = _in_run(values, _run_root(values))
    try:
        config = STAGES[stage].model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, STAGES[stage], path)) from None
    return _with_previous_stage(config, path, models_exist)


def _with_method(stage: str, values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The file's values with its method's settings under them; a method of the command line lies over the file."""
    named = [override for override in overrides if override.startswith("method=")]
    for override in named:
        set_path(values, override)
    method = values.get("method", "agrpo")
    settings = copy.deepcopy(presets(stage).get(method, {})) if isinstance(method, str) else {}
    return merge(values, settings) if named else merge(settings, values)


def _run_root(values: dict[str, Any]) -> str:
    run = values.get("run")
    run = run if isinstance(run, dict) else {}
    defaults = RunConfig()
    return str(Path(str(run.get("dir", defaults.dir))) / str(run.get("name", defaults.name)))


def _in_run(value: Any, root: str) -> Any:
    """`{run}` in any text stands for the run's directory, so that one file serves runs of every name."""
    if isinstance(value, dict):
        return {key: _in_run(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_run(item, root) for item in value]
    return value.replace("{run}", root) if isinstance(value, str) else value


def _with_previous_stage(config: Any, path: Path, models_exist: bool) -> Any:
    """Fill in the model that the previous stage left; with `models_exist`, every model of a run must be there."""
    model = config.model
    if model.name_or_path is None and model.gguf is None and model.config is None:
        model = model.model_copy(update={"name_or_path": str(config.run_root / "sft" / "model")})
        config = config.model_copy(update={"model": model})
    named = [("model.name_or_path", model.name_or_path)]
    if isinstance(config, PolicyConfig):
        config = config.model_copy(update={"rewards": _with_overlong(config)})
    if isinstance(config, PolicyConfig | PreferencesConfig):
        config = config.model_copy(update={"rewards": _with_reward_model(config.rewards, config)})
        named += [(f"rewards: {spec.label}", spec.parameters.get("model")) for spec in config.rewards]
    if isinstance(config, PolicyConfig | SFTConfig):
        rewards = _with_reward_model(config.evaluation.rewards, config)
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"rewards": rewards})})
        named += [(f"evaluation.rewards: {spec.label}", spec.parameters.get("model")) for spec in rewards]
    for key, name in named if models_exist else ():
        if name and Path(name).parts[:1] == config.run.dir.parts[:1] and not Path(name).exists():
            stage = "reward" if "/reward/" in name else "sft"
            raise ConfigError(f"{path}: {key}: {name} does not exist; run the stage that makes it first: agrpo {stage}")
    return config


def _with_overlong(config: PolicyConfig) -> list[RewardSpec]:
    """The rewards, and the punishment of overlong completions where it is asked for and not yet among them."""
    limit, overlong = config.sampling.max_completion_length, config.overlong
    if not overlong.buffer or any(spec.label == "overlong" for spec in config.rewards):
        return config.rewards
    buffer = max(1, round(overlong.buffer * limit))
    rule = {"target": "reward_models.rules.overlong", "weight": overlong.weight}
    return [*config.rewards, RewardSpec(**rule, limit=limit, buffer=buffer)]


def _with_reward_model(rewards: list[RewardSpec], config: Any) -> list[RewardSpec]:
    """A learned or implicit reward without models takes those that stages 2 and 1 of this run leave."""
    stages = {"model": str(config.run_root / "reward" / "model"), "reference": str(config.run_root / "sft" / "model")}
    wanted = {"reward_models.learned": ("model",), "reward_models.implicit": ("model", "reference")}
    return [
        RewardSpec(**{**{key: stages[key] for key in wanted.get(spec.target, ())}, **spec.model_dump()})
        for spec in rewards
    ]


def parse_command_line(stage: str, argv: list[str], note: Note = lambda text: None) -> Any:
    """The configuration from `[--config FILE] [key.path=value …]`. Exits 0 after --print-config, 2 when it is wrong."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # rewards of one's own: torchrun's workers and console scripts do not look there
    parser = argparse.ArgumentParser(prog=f"stages/*{stage}*/run.sh", description=STAGES[stage].__doc__)
    parser.add_argument("--config", type=Path, help="a YAML file (default: the quickstart's)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(stage, arguments.config, arguments.overrides, note)
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if arguments.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config

"""`agrpo pipeline CONFIGS [key.path=value …]`: the stages of a folder of configurations in sequence, then what they
measured as a table, and the curves. Overrides go to every stage. `agrpo quickstart` is that of `configs/quickstart`.

A pipeline that ended early goes on at that stage when it is given the same arguments again.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from agrpo.config.files import read_config
from agrpo.config.loading import resolve
from agrpo.places import configuration
from agrpo.yaml_input import ConfigError

COMMANDS = {"sft": "sft", "preferences": "preferences", "reward": "reward", "agrpo": "train"}  # by file, in their order
UNFINISHED = "pipeline.json"  # in the run's directory: the stage that ended early, and the arguments
Stage = tuple[str, Path, list[str]]  # name, configuration, overrides


def stages_of(folder: Path, overrides: list[str]) -> list[Stage]:
    """Each stage that has a file in the folder. The sampling of preferences understands `run.` and `seed` alone.

    Raises:
        ConfigError: there is none.
    """
    here = configuration(folder)
    common = [one for one in overrides if one.startswith(("run.", "seed="))]
    stages = [
        (stage, folder / f"{stage}.yaml", common if stage == "preferences" else overrides)
        for stage in COMMANDS
        if (here / f"{stage}.yaml").is_file()
    ]
    if not stages:
        files = ", ".join(f"{stage}.yaml" for stage in COMMANDS)
        raise ConfigError(f"{folder}: no folder with one of {files}")
    return stages


def check(stages: list[Stage]) -> Path:
    """Resolve every configuration before the first stage runs; the directory of the run.

    Raises:
        ConfigError: file, key and the mend; or the stages are of several runs.
    """
    roots: dict[Path, Path] = {}
    for stage, file, overrides in stages:
        values = _as_if_made(read_config(file, stage), file.parent)
        config: Any = resolve(stage, values, file, overrides, models_exist=False)
        roots[config.run_root] = file
    if len(roots) > 1:
        named = ", ".join(f"{root} ({file.name})" for root, file in roots.items())
        raise ConfigError(f"the stages are of several runs: {named}; give run.name=… for all of them")
    return next(iter(roots))


def _as_if_made(value: Any, folder: Path) -> Any:
    """A file's values, with something that is there for every file that a stage of the run has yet to make."""
    if isinstance(value, dict):
        return {key: _as_if_made(item, folder) for key, item in value.items()}
    if isinstance(value, str) and value.startswith("{run}/"):
        return str(configuration(folder))
    return value


def main(arguments: list[str]) -> int:
    """Exit code 0 when every stage ran, 2 for a configuration that is wrong, else the one of the stage that ended."""
    parser = argparse.ArgumentParser(prog="agrpo pipeline", description=__doc__)
    parser.add_argument("configs", type=Path, metavar="CONFIGS", help="a folder, such as configs/quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args(arguments)
    try:
        stages = stages_of(options.configs, options.overrides)
        root = check(stages)
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    return _run_all(stages, root, arguments) or _show(root)


def _run_all(stages: list[Stage], root: Path, arguments: list[str]) -> int:
    """Every stage from the one that ended early, or from the first; the exit code."""
    unfinished = root / UNFINISHED
    left = json.loads(unfinished.read_text(encoding="utf-8")) if unfinished.exists() else {}
    names = [name for name, _, _ in stages]
    first = names.index(left["stage"]) if left.get("arguments") == arguments and left["stage"] in names else 0
    if first:
        print(f"going on with {names[first]}; to start over, remove {unfinished}", flush=True)
    for name, file, overrides in stages[first:]:
        code = _run([sys.executable, "-m", "agrpo.cli", COMMANDS[name], "--config", str(file), *overrides])
        if code:
            root.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps({"stage": name, "arguments": arguments}) + "\n", encoding="utf-8")
            return code
    unfinished.unlink(missing_ok=True)
    return 0


def _run(command: list[str]) -> int:
    """A stage in a process of its own, which hears the signals that this one gets; its exit code."""
    process = subprocess.Popen(command)

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    handlers: dict[signal.Signals, Any] = {signal.SIGTERM: pass_on, signal.SIGUSR1: pass_on}
    handlers[signal.SIGINT] = signal.SIG_IGN  # a terminal sends it to both
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _show(root: Path) -> int:
    from agrpo.reporting.plots import main as plot
    from agrpo.reporting.summary import main as summary

    plot([str(root)])  # where nothing can draw, it says so
    return summary([str(root)])

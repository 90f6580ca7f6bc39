"""`agrpo doctor [--json] [--config FILE [--stage STAGE] [key.path=value …]]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agrpo.config import STAGES, RunConfig, load_config, stage_of
from agrpo.types import InputError
from agrpo.yaml_input import ConfigError


def main(arguments: list[str]) -> int:
    """Exit code 0 when the native backend passes, 1 when it does not, 2 for a configuration that is wrong."""
    parser = argparse.ArgumentParser(prog="agrpo doctor", description="What works on this machine, what is off, why.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--config", type=Path, help="also estimate what this configuration needs")
    parser.add_argument("--stage", choices=list(STAGES), help="whose configuration; by default as its file is called")
    parser.add_argument("--deadline", type=float, default=180.0, metavar="S", help="seconds for each self-test")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_intermixed_args(arguments)
    sys.path.append(os.getcwd())  # rewards of one's own
    try:
        if options.config is None and options.overrides:
            raise ConfigError(f"{options.overrides[0]}: there is no --config FILE that it would change")
        report = examine(options.config, options.stage, options.overrides, options.deadline)
    except (ConfigError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report))
    else:
        show(report, Console())
    return 0 if report["backends"]["native"]["status"] == "pass" else 1


def examine(path: Path | None, stage: str | None, overrides: list[str], deadline: float) -> dict[str, Any]:
    """The whole report, JSON values: machine, backends and, for a configuration, its estimate."""
    config = None if path is None else load_config(stage or stage_of(path), path, overrides)
    # After the configuration is checked: these import torch.
    from agrpo.doctor.backends import check_backends
    from agrpo.doctor.estimate import architecture, estimate
    from agrpo.doctor.machine import describe_machine, speeds

    machine = describe_machine(config.run.dir if config else RunConfig().dir)
    if config is None:
        return {"machine": machine, "backends": check_backends(deadline=deadline)}
    told = estimate(config, machine, speeds)
    return {"machine": machine, "backends": check_backends(config, architecture(config), deadline), "estimate": told}


def show(report: dict[str, Any], console: Console) -> None:
    """For a person: what works, what is off, why, what to do."""
    console.print(_machine(report["machine"]))
    console.print(_backends(report["backends"]))
    if "estimate" in report:
        _show_estimate(report["estimate"], console)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds"


def _between(low: float, high: float) -> str:
    return f"{_duration(low)} to {_duration(high)}"


def _machine(machine: dict[str, Any]) -> Table:
    table = Table(title="Machine", title_justify="left", show_header=False)
    memory, shm = machine["memory"], machine["shared_memory"]
    table.add_row("cores", str(machine["cores"]))
    table.add_row("memory", f"{_size(memory['free'])} free of {_size(memory['total'])}")
    for device in machine["devices"]:
        table.add_row("device", f"{device['name']}: {_size(device['free'])} free of {_size(device['total'])}")
    table.add_row("accelerator", machine["accelerator"])
    table.add_row("bfloat16", machine["bfloat16"])
    table.add_row("disk", f"{_size(machine['disk']['free'])} free at {machine['disk']['path']}")
    table.add_row("/dev/shm", "none: torch's data exchange needs it" if shm is None else f"{_size(shm['free'])} free")
    for name, one in machine["versions"].items():
        if not one["ok"]:
            table.add_row(name, f"{one['version'] or 'missing'}, wanted {one['bounds']}: bash scripts/setup.sh")
    inside = [f"{name} {one['version']}" for name, one in machine["versions"].items() if one["ok"]]
    table.add_row("versions in bounds", ", ".join(inside))
    for name, one in machine["extras"].items():
        missing = f"missing {', '.join(one['missing'])}: " + one["install"].replace("[", "\\[")
        table.add_row(f"extra {name}", "present" if one["present"] else missing)
    return table


def _backends(backends: dict[str, Any]) -> Table:
    table = Table(title="Backends", title_justify="left")
    for column in ("backend", "status", "why"):
        table.add_column(column)
    for name, one in backends.items():
        table.add_row(name, one["status"], one["reason"])
    return table


def _show_estimate(found: dict[str, Any], console: Console) -> None:
    model, per_rank = found["model"], f"one of {found['processes']}" if found["processes"] > 1 else "the only process"
    table = Table(title=f"Estimate for {per_rank}", title_justify="left", show_header=False)
    learns = f"{model['parameters']:,} parameters, {model['trainable']:,} of them learn"
    table.add_row("model", f"{model['family']}, {learns}")
    for name, size in found["parts"].items():
        if size:
            table.add_row(name, _size(size))
    table.add_row("at the worst moment", _size(found["total"]))
    if found["host"]:
        table.add_row("beside it, main memory", _size(found["host"]))
    table.add_row("free", _size(found["free"]))
    for name, seconds in found["seconds"].items():
        table.add_row(f"time of {name}", f"{_between(*seconds)} a step")
    if found["run_seconds"]:
        table.add_row("time of the run", _between(*found["run_seconds"]))
    console.print(table)
    for note in found["notes"]:
        console.print(note)
    if not found["fits"]:
        console.print(f"WARNING: does not fit: needs {_size(found['total'])}, free are {_size(found['free'])}.")
        for one in found["helps"]:
            enough = ", and then it fits" if one["enough"] else ""
            console.print(f"  {one['setting']} saves {_size(one['saves'])}{enough}", markup=False)

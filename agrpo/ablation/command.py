"""`agrpo ablate GRID`: run what is left of a grid, then the tables and the pictures of all of it.

agrpo ablate configs/ablations/seed.yaml --jobs 2
agrpo ablate configs/ablations/seed.yaml name=try seeds=[0] --rows no-kl,g4
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from agrpo.ablation.grid import Grid, Plan, plan, read_grid
from agrpo.ablation.runner import Failure, Manner, Runner, Stopped, forget_changed, require_unchanged, sole_owner
from agrpo.types import InputError
from agrpo.yaml_input import ConfigError


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        manner = _manner(options)
        grid = _rows(read_grid(options.grid, options.overrides), options.rows)
        planned = plan(grid, options.grid)
        if importlib.util.find_spec("scipy") is None:
            raise ConfigError("agrpo ablate: its tests need SciPy: pip install 'agrpo[ablate]'")
        if options.plan:
            print(_describe(planned))
            return 0
        with sole_owner(grid.root) as lock:
            if options.redo:
                for name in forget_changed(planned):
                    print(f"{name}: another configuration, to be run again")
            require_unchanged(planned)
            failures = [] if options.no_run else Runner(planned, manner, lock, _tell).run()
            return _finish(planned, failures, options.json)
    except Stopped:
        _tell("stopped by a signal: run again to go on")
        return 75
    except InputError as error:
        kind = "configuration error" if isinstance(error, ConfigError) else "error"
        print(f"{kind}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agrpo ablate", description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path, metavar="GRID", help="a YAML file, such as configs/ablations/seed.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="over the grid's file: seeds=[0,1]")
    parser.add_argument("--rows", metavar="ROW,ROW", help="these rows, and the full one")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each run (default: the cores over the jobs)")
    parser.add_argument("--prefix", default="", metavar="CMD", help='before each run\'s command, such as "nice -n 10"')
    parser.add_argument("--redo", action="store_true", help="run again what stands there with another configuration")
    parser.add_argument("--no-run", action="store_true", help="tables and pictures of what has finished, nothing else")
    parser.add_argument("--plan", action="store_true", help="check everything, list the runs, and exit")
    parser.add_argument("--json", action="store_true", help="print results.json instead of the tables")
    return parser


def _manner(options: argparse.Namespace) -> Manner:
    if options.jobs < 1 or (options.threads is not None and options.threads < 1):
        raise ConfigError("command line: --jobs and --threads are 1 or more")
    prefix = tuple(shlex.split(options.prefix))
    if prefix and shutil.which(prefix[0]) is None:
        raise ConfigError(f"command line: --prefix: there is no command {prefix[0]}")
    return Manner(options.jobs, options.threads or max(1, (os.cpu_count() or 1) // options.jobs), prefix)


def _rows(grid: Grid, names: str | None) -> Grid:
    if names is None:
        return grid
    chosen = set(names.split(","))
    if unknown := chosen - set(grid.rows):
        raise ConfigError(f"command line: --rows: {unknown.pop()} is none of {', '.join(grid.rows)}")
    kept = {name: row for name, row in grid.rows.items() if name in chosen | {grid.full}}
    return grid.model_copy(update={"rows": kept})


def _describe(planned: Plan) -> str:
    lines = [f"{job.name:<40} {'done' if job.finished else 'to do'}" for job in (*planned.sft, *planned.jobs)]
    done = sum(job.finished for job in (*planned.sft, *planned.jobs))
    return "\n".join([*lines, f"{len(planned.cells)} cells, {len(lines)} runs, {done} done"])


def _tell(text: str) -> None:
    print(text, flush=True)


def _finish(planned: Plan, failures: list[Failure], as_json: bool) -> int:
    from agrpo.ablation.results import write_results  # SciPy and matplotlib

    written = write_results(planned, failures)
    if written is None:
        print(f"error: {planned.grid.root}: no cell has finished, so there is nothing to show", file=sys.stderr)
        return 1
    print(json.dumps(json.loads((planned.grid.root / "results.json").read_text()), indent=1) if as_json else written)
    for failure in failures:
        print(f"{failure.name}: {failure.reason} ({failure.log})", file=sys.stderr)
    return 1 if failures else 0

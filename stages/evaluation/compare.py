"""`agrpo compare A B`: how often A's answers are better than B's, by a rule, a reward model or a judge."""

import argparse
import json
import sys
from pathlib import Path

from agrpo.evaluation.command import add_data, evaluate, exit_code, specs_of
from agrpo.evaluation.ledger import read_results
from agrpo.evaluation.runs import find_model
from agrpo.evaluation.win_rate import win_rate
from agrpo.reporting.files import read_jsonl


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    (spec,) = specs_of(options)
    sides = [results_of(name) or find_model(name) for name in (options.a, options.b)]
    from agrpo.engine import distributed
    from reward_models.configured import reward_set

    reward = reward_set([spec]).rewards[0]
    rows = [read(side) if side.endswith(".jsonl") else evaluate(options, side, None, None)[2] for side in sides]
    if distributed.rank() == 0:
        found = win_rate(*rows, reward, options.answers)
        if options.json:
            text = json.dumps({"a": sides[0], "b": sides[1], "reward": spec.label, **found.summary()}, indent=1) + "\n"
            sys.stdout.write(text) if options.json == "-" else Path(options.json).write_text(text, encoding="utf-8")
        print(found.in_words(*sides), end="", file=sys.stderr if options.json == "-" else sys.stdout)
    distributed.stop()


def results_of(name: str) -> str | None:
    """The file of an evaluation's results that the name means, None where it means a model."""
    inside = Path(name) / "results.jsonl"
    return name if name.endswith(".jsonl") else str(inside) if inside.is_file() else None


def read(path: str) -> list[dict]:
    """Results of `agrpo eval`, or a run's own evaluation-*.jsonl."""
    own = Path(path).name.startswith("evaluation-")
    return list(read_jsonl(Path(path))) if own else read_results(Path(path))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="agrpo compare", description=__doc__)
    what = "a run, a model's folder, a Hub id, or results of agrpo eval, or a run's evaluation-test.jsonl"
    options.add_argument("a", metavar="A", help=what)
    options.add_argument("b", metavar="B", help="what A is compared with")
    options.add_argument(
        "--reward", nargs=1, required=True, metavar="TARGET", help="an import path, or YAML of a rewards entry"
    )
    options.add_argument("--answers", choices=("samples", "greedy"), default="samples", help="which are compared")
    options.add_argument("--json", metavar="FILE", help="the numbers as JSON too; - is standard output")
    add_data(options)
    options.set_defaults(samples=1, pass_at=1.0, run_code=False, vote=None)
    return options


if __name__ == "__main__":
    raise SystemExit(exit_code(main, sys.argv[1:]))

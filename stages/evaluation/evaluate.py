"""`agrpo eval`: pass@1, pass@k, maj@k, reward and length of a model on a benchmark or on data of one's own."""

import argparse
import json
import sys
from pathlib import Path

from agrpo.evaluation.command import add_data, add_grading, evaluate, exit_code, sample_sizes
from agrpo.evaluation.runs import find_model


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    model, ks = find_model(options.model), sample_sizes(options)
    if options.lm_eval:
        from agrpo.evaluation.harness import run_harness

        return run_harness(model, options.lm_eval, options.lm_eval_args, options.json)
    from reward_models.grading import grading

    benchmark, data, rows = evaluate(options, model, options.out, grading)
    from agrpo.engine import distributed
    from agrpo.evaluation.summary import summarise, table

    summary = {"model": model, "benchmark": benchmark.name, **summarise(rows, ks), "left_out": len(data) - len(rows)}
    if distributed.rank() == 0:
        if options.json:
            text = json.dumps(summary, indent=1) + "\n"
            sys.stdout.write(text) if options.json == "-" else Path(options.json).write_text(text, encoding="utf-8")
        print(table(summary), end="", file=sys.stderr if options.json == "-" else sys.stdout)
    distributed.stop()
    return None


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="agrpo eval", description=__doc__)
    options.add_argument("--model", required=True, help="a run, a folder of a model, or a Hub id")
    options.add_argument("--lm-eval", metavar="TASKS", help="let lm-evaluation-harness measure: tasks, by commas")
    options.add_argument("--lm-eval-args", metavar="WORDS", default="", help="further arguments of lm_eval, one string")
    options.add_argument("--out", type=Path, help="directory of results.jsonl (default: by model, data and settings)")
    options.add_argument("--json", metavar="FILE", help="the numbers as JSON too; - is standard output")
    add_data(options)
    add_grading(options)
    return options


if __name__ == "__main__":
    raise SystemExit(exit_code(main, sys.argv[1:]))

"""runs/<name>/summary.json: what each stage measured, for scripts, and as a table for people.

    {"sft": {"test_pass1", "test_pass8", "test_greedy"}, "reward": {"pairwise_accuracy", "best_heuristic", "pairs"},
     "agrpo": {"test_pass1", "test_pass8", "test_greedy", "mean_length"}, "seconds": {"sft", "reward", "agrpo"}, "seed"}

A key is there once its stage has run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agrpo.reporting.files import replace, to_json

STAGES = {"sft": "SFT", "reward": "reward model", "agrpo": "A-GRPO"}
FILE = "summary.json"
_MEASURED = re.compile(r"test_pass(\d+)")


def record(run_root: Path, section: str, values: Mapping[str, Any], seconds: float, seed: int) -> None:
    """Puts a stage's results into the run's summary, and leaves the other stages' as they are.

    Args:
        run_root: runs/<name>.
        section: sft, reward or agrpo.
        values: the stage's measurements; a value that is not finite becomes null.
        seconds: how long the stage took.
        seed: the stage's seed; the summary keeps the last stage's.
    """
    if section not in STAGES:
        raise ValueError(f"no section {section!r} in a summary; there are {', '.join(STAGES)}")
    run_root.mkdir(parents=True, exist_ok=True)
    old = load(run_root) if (run_root / FILE).exists() else {}
    times = {**old.get("seconds", {}), section: round(seconds, 1)}
    summary = {**old, section: dict(values), "seconds": times, "seed": seed}
    ordered = {key: summary[key] for key in (*STAGES, "seconds", "seed") if key in summary}
    indented = json.dumps(json.loads(to_json(ordered)), indent=2)
    replace(run_root / FILE, [indented, "\n"])


def load(run_root: Path) -> dict[str, Any]:
    """The summary of a run.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not JSON; the message says what to do.
    """
    path = run_root / FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; a stage writes it when it ends") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it and run a stage again") from None


def table(summary: Mapping[str, Any]) -> Table:
    """One row for each thing measured, stage by stage."""
    view = Table("stage", "measured", "result", "", box=None, pad_edge=False, header_style="bold")
    view.columns[2].justify = "right"
    for stage, title in STAGES.items():
        rows = _rows(stage, summary)
        for i, row in enumerate(rows):
            view.add_row(title if i == 0 else "", *row, end_section=i == len(rows) - 1)
    return view


def _rows(stage: str, summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, result, remark) for each measurement of a stage that the summary has."""
    values, rows = summary.get(stage), []
    if values is None:
        return rows
    if stage == "reward":
        on = f"on {values['pairs']:,} pairs" if values.get("pairs") is not None else ""
        rows.append(("held-out pairwise accuracy", _percent(values.get("pairwise_accuracy")), on))
        rows.append(("best heuristic", _percent(values.get("best_heuristic")), "on the same pairs"))
    else:
        before = summary.get("sft", {}) if stage == "agrpo" else {}
        for key in values:
            what = _MEASURED.sub(r"test pass@\1", key) if _MEASURED.fullmatch(key) else "test greedy"
            if _MEASURED.fullmatch(key) or key == "test_greedy":
                rows.append((what, _percent(values[key]), _change(before.get(key), values[key])))
        if values.get("mean_length") is not None:
            rows.append(("mean length", f"{values['mean_length']:.1f}", "tokens"))
    seconds = summary.get("seconds", {}).get(stage)
    if seconds is not None:
        rows.append(("time", f"{seconds:,.0f} s", ""))
    return rows


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f}%"


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{100 * (after - before):+.1f} points on SFT"


def places(run_root: Path) -> list[tuple[str, Path]]:
    """Where the run's results are: those that exist, the trained policy first."""
    candidates = [
        ("model", run_root / "agrpo" / "model"),
        ("reward model", run_root / "reward" / "model"),
        ("SFT model", run_root / "sft" / "model"),
        ("curves", run_root / "curves.png"),
        ("report", run_root / "report.html"),
        *((f"{STAGES[stage]} metrics", run_root / stage / "metrics.jsonl") for stage in reversed(STAGES)),
        ("summary", run_root / FILE),
    ]
    return [(what, path) for what, path in candidates if path.exists()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="agrpo.reporting.summary", description="What a run measured, and where it is."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a run, such as runs/quickstart")
    parser.add_argument("--json", action="store_true", help="print summary.json instead of the table")
    options = parser.parse_args(arguments)
    try:
        summary = load(options.directory)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(summary, indent=2))
        return 0
    console = Console()
    console.print()
    console.print(table(summary))
    console.print()
    for what, path in places(options.directory):
        console.print(f"{what:<20} {path}", soft_wrap=True, markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

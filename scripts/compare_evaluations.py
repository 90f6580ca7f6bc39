"""Two evaluations of the same prompts side by side, in all and by a column of the data, as Markdown.

    python scripts/compare_evaluations.py runs/a/sft/evaluation-before.jsonl runs/a/agrpo/evaluation-test.jsonl \\
        --samples-per-prompt 4 --by kind --show 6

Intervals are 95% bootstrap intervals over prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from agrpo.evaluation.intervals import bootstrap_interval

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(row: Row) -> str:
    return row["text"] if isinstance(row["text"], str) else row["text"][-1]["content"]


def rates(rows: list[Row], k: int) -> dict[str, list[float]]:
    return {
        "pass@1": [r["passes"] / k for r in rows],
        f"pass@{k}": [float(r["passes"] > 0) for r in rows],
        "greedy": [float(r["greedy_passes"]) for r in rows],
    }


def with_interval(values: list[float]) -> str:
    low, high = bootstrap_interval(values)
    return f"{sum(values) / len(values):.3f} [{low:.3f}, {high:.3f}]"


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--samples-per-prompt", type=int, required=True, help="evaluation.samples of both")
    parser.add_argument("--by", help="a column of the data")
    parser.add_argument("--show", type=int, default=0, help="prompts whose greedy completions are shown, evenly spaced")
    options = parser.parse_args()
    before, after = read(options.before), read(options.after)
    if [question(r) for r in before] != [question(r) for r in after]:
        parser.error(f"{options.before} and {options.after} hold different prompts")
    groups = {"all": list(range(len(before)))}
    if options.by:
        for value in sorted({str(r["columns"][options.by]) for r in before}):
            groups[value] = [i for i, r in enumerate(before) if str(r["columns"][options.by]) == value]
    k = options.samples_per_prompt
    names = list(rates(before, k))
    print(line([options.by or "", "prompts", *(f"{name} {when}" for name in names for when in ("before", "after"))]))
    print(line(["---"] * (2 + 2 * len(names))))
    for group, members in groups.items():
        old, new = (rates([rows[i] for i in members], k) for rows in (before, after))
        print(line([group, str(len(members)), *(with_interval(r[name]) for name in names for r in (old, new))]))
    if options.show:
        print("\nGreedy completions, ✓ where they pass:\n")
        for i in range(0, len(before), max(1, len(before) // options.show)):
            marks = ["✓" if rows[i]["greedy_passes"] else "✗" for rows in (before, after)]
            print(f"- **{question(before[i])}**")
            for when, row, mark in (("before", before[i], marks[0]), ("after", after[i], marks[1])):
                print(f"  - {when} {mark} {json.dumps(row['greedy'], ensure_ascii=False)}")


if __name__ == "__main__":
    main()

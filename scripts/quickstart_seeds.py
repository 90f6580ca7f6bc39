"""The quickstart under several seeds, beside the goals it has to reach, as a Markdown table.

    python scripts/quickstart_seeds.py --seeds 0 1 2 3 4 [--jobs 2]

Exits 1 when a seed misses a goal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GOALS = (
    "pass@1 gains 0.20 or more; pass@8 loses 0.03 at most; the reward model reaches 0.75 and 0.10 over heuristics;"
    " with the learned reward alone pass@1 gains too"
)


def run(seed: int, threads: int, reuse: bool) -> dict[str, Any]:
    """The whole pipeline under a seed, and stage 3 again with the learned reward alone; the summary of both."""
    name = f"quickstart-seed{seed}"
    whole = ["scripts/pipeline.sh", "configs/quickstart", f"run.name={name}"]
    learned = [
        "stages/stage3_agrpo/run.sh",
        f"run.name={name}-learned",
        f"model.name_or_path=runs/{name}/sft/model",
        f"rewards=[{{target: reward_models.learned, model: runs/{name}/reward/model}}]",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    (ROOT / "runs").mkdir(exist_ok=True)
    for run_name, command in ((name, whole), (f"{name}-learned", learned)):
        if reuse and (ROOT / "runs" / run_name / "agrpo" / "result.json").exists():
            continue
        with (ROOT / "runs" / f"{run_name}.log").open("w", encoding="utf-8") as log:
            subprocess.run(
                ["bash", *command, f"seed={seed}"],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
    summary, alone = (json.loads((ROOT / "runs" / n / "summary.json").read_text()) for n in (name, f"{name}-learned"))
    return {**summary, "learned": alone["agrpo"]}


def reached(summary: dict[str, Any]) -> bool:
    sft, reward, agrpo = summary["sft"], summary["reward"], summary["agrpo"]
    return (
        agrpo["test_pass1"] >= sft["test_pass1"] + 0.20
        and agrpo["test_pass8"] >= sft["test_pass8"] - 0.03
        and reward["pairwise_accuracy"] >= max(0.75, reward["best_heuristic"] + 0.10)
        and summary["learned"]["test_pass1"] > sft["test_pass1"]
    )


COLUMNS = (
    "seed",
    "pass@1",
    "pass@8",
    "greedy",
    "mean length",
    "mixed groups",
    "reward model (best heuristic)",
    "learned reward alone: pass@1, pass@8",
    "seconds",
    "reached",
)


def row(summary: dict[str, Any]) -> list[str]:
    sft, reward, agrpo = summary["sft"], summary["reward"], summary["agrpo"]

    def change(key: str, digits: int = 3) -> str:
        return f"{sft[key]:.{digits}f} → {agrpo[key]:.{digits}f}"

    return [
        str(summary["seed"]),
        change("test_pass1"),
        change("test_pass8"),
        change("test_greedy"),
        change("mean_length", 1),
        change("mixed_groups", 2),
        f"{reward['pairwise_accuracy']:.3f} ({reward['best_heuristic']:.3f})",
        f"{summary['learned']['test_pass1']:.3f}, {summary['learned']['test_pass8']:.3f}",
        f"{sum(summary['seconds'].values()):.0f}",
        "yes" if reached(summary) else "NO",
    ]


def markdown(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="pipelines at a time, the cores shared between them")
    parser.add_argument("--reuse", action="store_true", help="take runs that have finished as they are")
    options = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        summaries = list(pool.map(lambda seed: run(seed, threads, options.reuse), options.seeds))
    print(f"Goals: {GOALS}.\n")
    print(markdown(COLUMNS))
    print(markdown("---" for _ in COLUMNS))
    for summary in summaries:
        print(markdown(row(summary)))
    return 0 if all(map(reached, summaries)) else 1


if __name__ == "__main__":
    sys.exit(main())

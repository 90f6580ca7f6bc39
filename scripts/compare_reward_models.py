"""Reward models by the confidence-weighted group loss beside plain Bradley–Terry, on the same data and seeds.

    python scripts/compare_reward_models.py --train train.jsonl --test test.jsonl [--seeds 0 1 2] [--jobs 2]
        [key.path=value …]

Prints a Markdown table: held-out pairwise accuracy with its interval, and the best heuristic on the same pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"confidence-weighted group loss": "agrpo", "Bradley–Terry": "bradley_terry"}


def run(name: str, method: str, seed: int, options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """One reward model; what it measured."""
    command = [
        "bash",
        "stages/stage2_reward/run.sh",
        "--config",
        str(options.config),
        f"run.name={name}",
        f"method={method}",
        f"seed={seed}",
        f"data.path={options.train.resolve()}",
        f"evaluation.test.path={options.test.resolve()}",
        *options.overrides,
    ]
    (ROOT / "runs").mkdir(exist_ok=True)
    with (ROOT / "runs" / f"{name}.log").open("w", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    result = json.loads((ROOT / "runs" / name / "reward" / "result.json").read_text())
    return {**result["results"], "seconds": result["seconds"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("configs/smollm2-135m-data/reward.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, the cores shared between them")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_intermixed_args()
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    work = [(label, method, seed) for seed in options.seeds for label, method in METHODS.items()]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(
            pool.map(
                lambda one: run(f"compare-{options.train.stem}-{one[1]}-{one[2]}", one[1], one[2], options, threads),
                work,
            )
        )
    rows = [{"loss": label, "seed": seed, **result} for (label, _, seed), result in zip(work, found, strict=True)]
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print("| loss | seed | held-out pairwise accuracy | calibration error | best heuristic | pairs | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in sorted(rows, key=lambda r: (r["loss"], r["seed"])):
        low, high = row["pairwise_accuracy_interval"]
        print(
            f"| {row['loss']} | {row['seed']} | {row['pairwise_accuracy']:.3f} [{low:.3f}, {high:.3f}] |"
            f" {row['expected_calibration_error']:.3f} | {row['best_heuristic']:.3f} ({row['best_heuristic_name']}) |"
            f" {row['pairs']} | {row['seconds']:.0f} |"
        )
    for label in METHODS:
        of_label = [row["pairwise_accuracy"] for row in rows if row["loss"] == label]
        print(f"\n{label}: mean {sum(of_label) / len(of_label):.3f} over {len(of_label)} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())

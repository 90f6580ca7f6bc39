"""What a finished cell measured, read from its directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrpo.ablation.grid import Cell, Plan
from agrpo.reporting.files import read_jsonl
from agrpo.types import InputError

# A measure, and the metric of a step whose mean over the run's first and last `window` steps it has.
OF_STEPS = {
    "training_reward": "reward",
    "kl": "agrpo/kl_symmetric",
    "entropy": "entropy",
    "advantage_variance": "agrpo/advantage_variance",
}


@dataclass(frozen=True)
class Measured:
    """One cell. `started` and `values` hold a mean over the first and the last steps, but for the variance of the
    advantages: there `values` has all steps, since a claim about it is one about the whole of training."""

    row: str
    method: str
    seed: int
    values: dict[str, float]  # by measure: those of OF_STEPS, and reward, length, win
    started: dict[str, float]  # those of OF_STEPS
    ended: dict[str, float]
    seconds: float
    versions: str


@dataclass(frozen=True)
class Wins:
    """Shares of all pairs of samples on the same prompt, one by each model: the first's passes and the other's does
    not, the other way round, or both do alike."""

    won: float
    lost: float

    @property
    def tied(self) -> float:
        return 1 - self.won - self.lost

    @property
    def rate(self) -> float:
        """A tie counts one half."""
        return self.won + self.tied / 2


def wins(ours: Sequence[float], theirs: Sequence[float]) -> Wins:
    """Of two models' pass rates on the same prompts, in the same order."""
    pairs = list(zip(ours, theirs, strict=True))
    return Wins(sum(a * (1 - b) for a, b in pairs) / len(pairs), sum(b * (1 - a) for a, b in pairs) / len(pairs))


def measure(plan: Plan, cell: Cell) -> Measured | None:
    """A cell's numbers; None where it has not finished.

    Raises:
        InputError: its files do not hold what a finished run leaves.
    """
    directory, window = cell.job.directory, plan.grid.window
    if not cell.job.finished:
        return None
    result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    steps = list(read_jsonl(directory / "metrics.jsonl"))
    series = {name: _series(directory, steps, key) for name, key in OF_STEPS.items()}
    sft = next(job for job in plan.sft if job.seed == cell.seed)
    started = {name: _mean(values[:window]) for name, values in series.items()}
    ended = {name: _mean(values[-window:]) for name, values in series.items()}
    rates = (pass_rates(job.directory, job.config.evaluation.samples) for job in (cell.job, sft))
    return Measured(
        row=cell.row,
        method=cell.method,
        seed=cell.seed,
        values=ended
        | {
            "advantage_variance": _mean(series["advantage_variance"]),
            "reward": result["results"]["test_pass1"],
            "length": result["results"]["mean_length"],
            "win": wins(*rates).rate,
        },
        started=started,
        ended=ended,
        seconds=result["seconds"],
        versions=_versions(directory / "config.yaml"),
    )


def pass_rates(directory: Path, samples: int) -> tuple[float, ...]:
    """The share of its samples that pass, of each test prompt."""
    rows = sorted(read_jsonl(directory / "evaluation-test.jsonl"), key=lambda row: row["slot"])
    return tuple(row["passes"] / samples for row in rows)


def _series(directory: Path, steps: list[dict[str, Any]], key: str) -> list[float]:
    found = [row[key] for row in steps if row.get(key) is not None]
    if not found:
        raise InputError(f"{directory / 'metrics.jsonl'}: holds no {key}; run the cell again with --redo")
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _versions(config: Path) -> str:
    lines = config.read_text(encoding="utf-8").splitlines()
    return "; ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))

"""From cells to what a grid shows: means over seeds, paired differences, verdicts on claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from agrpo.ablation.claims import Verdict, judge_all
from agrpo.ablation.grid import Job, Plan
from agrpo.ablation.measures import OF_STEPS, Measured, measure, pass_rates, wins
from agrpo.ablation.statistics import Contrast, Estimate, contrast, holm, t_interval

# By measure: its heading, digits behind the point, what it is counted in.
MEASURES: dict[str, tuple[str, int, str]] = {
    "win": ("win over SFT", 3, "share"),
    "reward": ("reward", 3, "test"),
    "kl": ("KL", 4, "nats/token"),
    "entropy": ("entropy", 4, "nats/token"),
    "length": ("length", 1, "tokens"),
    "advantage_variance": ("advantage variance", 3, ""),
    "training_reward": ("training reward", 3, ""),
}


@dataclass(frozen=True)
class Line:
    """A row of the grid under one method."""

    row: str
    method: str
    estimates: dict[str, Estimate]  # by measure; empty where no seed has finished
    seeds: tuple[int, ...]
    same_as: str | None  # the row whose runs these are


@dataclass(frozen=True)
class Difference:
    """A measure of a row, method − baseline, over the seeds that both have."""

    row: str
    measure: str
    baseline: float  # the means of both over these seeds
    method: float
    contrast: Contrast
    p_holm: float  # of the t test, over the rows with runs of their own


@dataclass(frozen=True)
class Comparison:
    plan: Plan
    cells: tuple[Measured, ...]
    lines: tuple[Line, ...]
    differences: tuple[Difference, ...]
    beats: dict[str, Estimate]  # by row: the method's wins over the baseline, ties one half
    sft_reward: Estimate  # what every row starts from
    verdicts: tuple[Verdict, ...]

    def line(self, row: str, method: str) -> Line:
        return next(line for line in self.lines if (line.row, line.method) == (row, method))

    def difference(self, row: str, measure: str) -> Difference | None:
        return next((d for d in self.differences if (d.row, d.measure) == (row, measure)), None)


def compare(plan: Plan) -> Comparison:
    """Everything that the finished cells show. Cells that have not finished are left out of their means."""
    cells = [measured for cell in plan.cells if (measured := measure(plan, cell)) is not None]
    lines = tuple(_line(plan, row, method, cells) for row in plan.grid.rows for method in plan.grid.methods)
    differences = tuple(d for name in MEASURES for d in _differences(plan, name, cells))
    beats = {row: found for row in plan.grid.rows if (found := _beats(plan, row, cells)) is not None}
    sft = t_interval([sum(rates) / len(rates) for job in plan.sft if job.finished and (rates := _rates(job))] or [0.0])
    return Comparison(plan, tuple(cells), lines, differences, beats, sft, tuple(_verdicts(plan, cells)))


def _of(cells: Sequence[Measured], row: str, method: str) -> dict[int, Measured]:
    return {cell.seed: cell for cell in cells if (cell.row, cell.method) == (row, method)}


def _both(plan: Plan, row: str, cells: Sequence[Measured]) -> list[tuple[Measured, Measured]]:
    """(baseline, method) of each seed that has both."""
    below, above = (_of(cells, row, method) for method in (plan.grid.baseline, plan.grid.method))
    return [(below[seed], above[seed]) for seed in plan.grid.seeds if seed in below and seed in above]


def _line(plan: Plan, row: str, method: str, cells: Sequence[Measured]) -> Line:
    found = _of(cells, row, method)
    estimates = {name: t_interval([cell.values[name] for cell in found.values()]) for name in MEASURES if found}
    return Line(row, method, estimates, tuple(found), plan.same_as(plan.cell(row, method, plan.grid.seeds[0])))


def _differences(plan: Plan, name: str, cells: Sequence[Measured]) -> list[Difference]:
    pairs = {row: pairs for row in plan.grid.rows if (pairs := _both(plan, row, cells))}
    contrasts = {row: contrast([b.values[name] - a.values[name] for a, b in pairs[row]]) for row in pairs}
    own = [row for row in contrasts if not _repeats(plan, row)]
    adjusted = dict(zip(own, holm([contrasts[row].p_t for row in own]), strict=True))
    ends = {row: [fmean(cell.values[name] for cell in side) for side in zip(*pairs[row], strict=True)] for row in pairs}
    return [
        Difference(row, name, *ends[row], found, adjusted.get(row, adjusted.get(_repeats(plan, row) or "", found.p_t)))
        for row, found in contrasts.items()
    ]


def _repeats(plan: Plan, row: str) -> str | None:
    """The row whose runs a row shares under both methods."""
    seed = plan.grid.seeds[0]
    same = {plan.same_as(plan.cell(row, method, seed)) for method in plan.grid.methods}
    return same.pop() if len(same) == 1 else None


def _beats(plan: Plan, row: str, cells: Sequence[Measured]) -> Estimate | None:
    rates = []
    for below, above in _both(plan, row, cells):
        rates.append(wins(*(_rates(plan.cell(row, cell.method, cell.seed).job) for cell in (above, below))).rate)
    return t_interval(rates) if rates else None


def _rates(job: Job) -> tuple[float, ...]:
    return pass_rates(job.directory, job.config.evaluation.samples)


def _verdicts(plan: Plan, cells: Sequence[Measured]) -> list[Verdict]:
    pairs = _both(plan, plan.grid.full, cells)
    if not pairs:
        return []
    numbers = {
        name: (
            [below.values[name] for below, _ in pairs],
            [above.values[name] for _, above in pairs],
            [above.started[name] for _, above in pairs] if name in OF_STEPS else [],
            [above.ended[name] for _, above in pairs] if name in OF_STEPS else [],
        )
        for name in MEASURES
    }
    return judge_all(plan.grid.claims, numbers)

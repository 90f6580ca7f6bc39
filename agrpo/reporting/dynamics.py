"""dynamics.png: how runs learned, beside each other. Six panels of learning, four of what adapts, a band over seeds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agrpo.reporting.files import Series, read_series
from agrpo.reporting.plots import STYLE, running_mean

# Okabe and Ito's colours that stand out on white, told apart with any kind of colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_SEED = re.compile(r"[-_.]?seed[-_.]?\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Panel:
    """One set of axes: the first of `names` that a run recorded."""

    names: tuple[str, ...]
    title: str
    unit: str
    smooth: bool = False


PANELS = (
    Panel(("evaluation/pass1", "evaluation/greedy"), "Accuracy", "evaluation pass@1"),
    Panel(("reward",), "Averaged reward", "reward of a step", smooth=True),
    Panel(("reward",), "Training reward", "reward of a step"),
    Panel(("agrpo/kl_symmetric", "kl"), "KL to the reference", "nats a token", smooth=True),
    Panel(("agrpo/advantage_variance",), "Advantage variance", "of a completion", smooth=True),
    Panel(("entropy",), "Entropy", "nats a token", smooth=True),
    Panel(("agrpo/beta",), "β, weight of the divergence", "value"),
    Panel(("agrpo/epsilon",), "ε, clip range", "value"),
    Panel(("agrpo/lambda",), "λ, share of the preference loss", "value"),
    Panel(("agrpo/uncertainty",), "Preference uncertainty", "bits", smooth=True),
)


@dataclass(frozen=True)
class Band:
    """The runs of a family at the steps that all of them recorded."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    runs: int


def family(name: str) -> str:
    """A run's name without its seed: runs that share it differ by chance alone."""
    return _SEED.sub("", name) or name


def families(runs: Sequence[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for run in runs:
        found.setdefault(family(run.resolve().name), []).append(run)
    return found


def over_seeds(curves: Sequence[Series]) -> Band:
    """Mean and range of several curves at the steps that they share."""
    values = [dict(zip(*curve, strict=True)) for curve in curves]
    steps = sorted(set.intersection(*(set(of_run) for of_run in values)))
    columns = [[of_run[step] for of_run in values] for step in steps]
    return Band(
        steps=steps,
        mean=[statistics.fmean(column) for column in columns],
        low=[min(column) for column in columns],
        high=[max(column) for column in columns],
        runs=len(curves),
    )


def plot_dynamics(runs: Mapping[str, Sequence[Path]], out: Path, colours: Sequence[str] = COLOURS) -> Path:
    """Draws stage 3 of the runs over each other; a panel that no run recorded, or where all are 0, takes no room.

    Args:
        runs: by the name of a line, the run directories that it is the mean of, in a band from the least to the
            greatest of them.
        colours: of the lines.

    Raises:
        FileNotFoundError: no run recorded anything that is drawn here.
    """
    recorded = {
        name: [read_series(run / "agrpo" / "metrics.jsonl") for run in members] for name, members in runs.items()
    }
    panels = [panel for panel in PANELS if any(_moves(_curves(panel, members)) for members in recorded.values())]
    if not panels:
        named = ", ".join(str(run) for members in runs.values() for run in members)
        raise FileNotFoundError(f"{named}: no agrpo/metrics.jsonl with anything to draw")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(4.2 * columns, 2.7 * rows + 0.4), squeeze=False, layout="constrained"
        )
        for axis, panel in zip(axes.flat, panels, strict=False):
            for i, (name, members) in enumerate(recorded.items()):
                _draw(axis, panel, name, _curves(panel, members), colours[i % len(colours)])
            unit = f"{panel.unit}, running mean" if panel.smooth else panel.unit
            axis.set(title=panel.title, xlabel="step", ylabel=unit, xlim=(0, None))
            axis.xaxis.get_major_locator().set_params(integer=True)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        figure.align_ylabels(axes)
        _legend(figure, axes.flat, bands=any(len(members) > 1 for members in runs.values()))
        figure.savefig(out, dpi=150)
        pyplot.close(figure)
    return out


def _curves(panel: Panel, members: Sequence[Mapping[str, Series]]) -> list[Series]:
    found = []
    for series in members:
        curve = next((series[name] for name in panel.names if name in series), None)
        if curve is not None:
            found.append(curve)
    return found


def _moves(curves: Sequence[Series]) -> bool:
    return any(value != 0 for _, values in curves for value in values)


def _draw(axis, panel: Panel, name: str, curves: Sequence[Series], colour: str) -> None:
    if panel.smooth:
        curves = [(steps, running_mean(values, max(5, len(values) // 20))) for steps, values in curves]
    if not curves:
        return
    band = over_seeds(curves)
    few = len(band.steps) < 15
    label = f"{name} ({band.runs} runs)" if band.runs > 1 else name
    axis.plot(band.steps, band.mean, "o-" if few else "-", color=colour, label=label, linewidth=1.6, markersize=3)
    if band.runs > 1:
        axis.fill_between(band.steps, band.low, band.high, color=colour, alpha=0.18, linewidth=0)


def _legend(figure, axes, bands: bool) -> None:
    """Each line once, whichever panel has it, and how to read them."""
    found = {}
    for axis in axes:
        for mark, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, mark)
    if len(found) > 1:
        figure.legend(found.values(), found, loc="outside upper left", ncols=min(4, len(found)), fontsize=10)
    reading = "running means: of a twentieth of the steps, at least 5"
    if bands:
        reading = f"lines: means over seeds · bands: from the least seed to the greatest · {reading}"
    if bands or len(found) > 1:
        figure.legend(handles=[], title=reading, title_fontsize=8, loc="outside lower right")

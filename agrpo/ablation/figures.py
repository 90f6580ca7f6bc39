"""The pictures of a comparison: bars and radars of both methods over the grid's rows, and the full row in training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from agrpo.ablation.comparison import MEASURES, Comparison
from agrpo.ablation.statistics import Estimate
from agrpo.reporting.dynamics import plot_dynamics
from agrpo.reporting.plots import STYLE

COLORS = ("#8a8f98", "#3465a4")  # baseline, method
BARS = ("reward", "kl", "entropy", "length")
RADARS = ("reward", "kl", "entropy")
_STYLE = {**STYLE, "axes.grid": False}


def draw_bars(found: Comparison, out: Path) -> Path:
    """A panel a measure, a pair of bars a row: means over seeds, 95% t intervals, and a point for every seed.

    The bars of the reward begin at the SFT model's, the others at 0.
    """
    pyplot = _pyplot()
    rows = list(found.plan.grid.rows)
    with pyplot.rc_context(_STYLE):
        size = (3.3 * len(BARS), 0.46 * len(rows) + 1.3)
        figure, axes = pyplot.subplots(1, len(BARS), figsize=size, sharey=True, layout="constrained")
        for axis, name in zip(axes, BARS, strict=True):
            _bars(axis, found, rows, name)
        axes[0].set_yticks(range(len(rows)), [found.plan.grid.rows[row].label for row in rows])
        axes[0].set_ylim(len(rows) - 0.4, -0.6)
        _legend(figure, found, "bars: means · lines: 95% t intervals over seeds · points: seeds")
        figure.savefig(out, dpi=150)
        pyplot.close(figure)
    return out


def _bars(axis: Any, found: Comparison, rows: list[str], name: str) -> None:
    title = MEASURES[name][0]
    start = _start(found, name)
    for place, method, color in _methods(found):
        offset = 0.19 if place else -0.19
        for y, row in enumerate(rows):
            estimate = found.line(row, method).estimates.get(name)
            if estimate is None:
                continue
            axis.barh(y + offset, estimate.mean - start, 0.36, start, color=color, alpha=0.75, linewidth=0)
            if not math.isnan(estimate.low):
                axis.plot([estimate.low, estimate.high], [y + offset] * 2, color="#333333", linewidth=0.9)
            seeds = [cell.values[name] for cell in found.cells if (cell.row, cell.method) == (row, method)]
            axis.scatter(seeds, [y + offset] * len(seeds), s=7, color="white", edgecolor=color, linewidth=0.8, zorder=3)
    axis.set_xlim(start, _top(found, name))
    axis.set(title=title, xlabel=_scale(found, name))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    axis.set_axisbelow(True)


def _start(found: Comparison, name: str) -> float:
    """Where a scale begins: 0 for what is counted from nothing; a reward counts from the SFT model's."""
    return found.sft_reward.mean if name == "reward" else 0.0


def _top(found: Comparison, name: str) -> float:
    """Where a scale ends: by the seeds, since the interval of few seeds may be wider than all of them by far."""
    greatest = max(cell.values[name] for cell in found.cells)
    ends = [e.high for line in found.lines if (e := line.estimates.get(name)) and not math.isnan(e.high)]
    top = 1.02 * max(greatest, min(max(ends, default=0.0), 1.25 * greatest))
    return min(1.0, top) if name == "reward" else top


def draw_radars(found: Comparison, out: Path) -> Path:
    """A radar a measure, a spoke a row: means over seeds with bands from the least seed to the greatest.

    The scale of the reward begins at the SFT model's, the others at 0.
    """
    pyplot = _pyplot()
    rows = list(found.plan.grid.rows)
    with pyplot.rc_context(_STYLE):
        size = (5.2 * len(RADARS), 4.7)
        polar = {"projection": "polar"}
        figure, axes = pyplot.subplots(1, len(RADARS), figsize=size, subplot_kw=polar, layout="constrained")
        figure.get_layout_engine().set(wspace=0.1)
        for axis, name in zip(axes, RADARS, strict=True):
            _radar(axis, found, rows, name)
        _legend(figure, found, "lines: means over seeds · bands: from the least seed to the greatest")
        figure.savefig(out, dpi=150)
        pyplot.close(figure)
    return out


def _radar(axis: Any, found: Comparison, rows: list[str], name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    title = MEASURES[name][0]
    angles, start = [2 * math.pi * i / len(rows) for i in range(len(rows))], _start(found, name)
    for place, method, color in _methods(found):
        means = [_mean(found.line(row, method).estimates.get(name)) for row in rows]
        seeds = [[c.values[name] for c in found.cells if (c.row, c.method) == (row, method)] for row in rows]
        # A radius below the centre would come out on the other side.
        low, high = ([max(start, end(s)) if s else math.nan for s in seeds] for end in (min, max))
        closed = [*angles, angles[0]]
        axis.plot(closed, [*means, means[0]], color=color, linewidth=1.6, marker="o", markersize=3, zorder=3 + place)
        axis.fill_between(closed, [*low, low[0]], [*high, high[0]], color=color, alpha=0.22, linewidth=0)
    axis.set_theta_zero_location("N")
    axis.set_theta_direction(-1)
    axis.set_xticks(angles, [""] * len(rows))
    for angle, row in zip(angles, rows, strict=True):
        side = math.sin(angle)
        where = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
        text = found.plan.grid.rows[row].label
        at = {"ha": where, "va": "center", "fontsize": 8, "transform": axis.get_xaxis_transform()}
        axis.text(angle, 1.07, text.replace(", ", ",\n"), **at)
    axis.set_ylim(bottom=start)
    axis.set_rlabel_position(180 / len(rows))
    axis.tick_params(axis="y", labelsize=7, labelcolor="#888888")
    axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines["polar"].set_color("#cccccc")
    axis.set_title(f"{title} ({_scale(found, name)})", pad=30)


def _scale(found: Comparison, name: str) -> str:
    """What a scale counts, and from where."""
    unit = MEASURES[name][2]
    return f"{unit}, from the SFT model's {_start(found, name):.3f}" if name == "reward" else unit


def draw_dynamics(found: Comparison, out: Path) -> Path | None:
    """The full row while it trains, beside what adapts; None where none of its cells has finished."""
    grid = found.plan.grid
    runs = {
        grid.methods[method].label: [found.plan.cell(grid.full, method, seed).job.config.run_root for seed in seeds]
        for _, method, _ in _methods(found)
        if (seeds := found.line(grid.full, method).seeds)
    }
    return plot_dynamics(runs, out, COLORS) if runs else None


def _mean(estimate: Estimate | None) -> float:
    return math.nan if estimate is None else estimate.mean


def _methods(found: Comparison) -> list[tuple[int, str, str]]:
    """(0, the baseline, its colour), (1, the method, its colour)."""
    grid = found.plan.grid
    return [(0, grid.baseline, COLORS[0]), (1, grid.method, COLORS[1])]


def _legend(figure: Any, found: Comparison, reading: str) -> None:
    from matplotlib.patches import Patch

    labels = [(found.plan.grid.methods[method].label, color) for _, method, color in _methods(found)]
    handles = [Patch(color=color, label=label) for label, color in labels]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=10)
    figure.text(0.995, 0.99, reading, ha="right", va="top", fontsize=8, color="#666666")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

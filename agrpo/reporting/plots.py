"""curves.png: a run at a glance, drawn from the stages' metrics.jsonl."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agrpo.reporting.files import Series, read_series

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
BLUE, ORANGE, GREEN, GREY = "#3465a4", "#d9730d", "#3a8f5c", "#777777"


@dataclass(frozen=True)
class Line:
    """A curve of a panel: the first of `names` that the stage recorded."""

    names: tuple[str, ...]
    label: str
    color: str
    points: bool = False  # measured now and then: marks joined by a thin line, and never smoothed
    smooth: bool = False  # noisy: the raw curve pale, its running mean on top


@dataclass(frozen=True)
class Panel:
    """One set of axes. It is left out when none of its lines was recorded."""

    stage: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    log: bool = False


PASS1 = Line(("evaluation/pass1",), "evaluation pass@1", ORANGE, points=True)
GREEDY = Line(("evaluation/greedy",), "evaluation greedy", GREEN, points=True)
PANELS = (
    Panel("sft", "SFT: loss", "nats / token", (Line(("loss",), "loss", BLUE, smooth=True),)),
    Panel(
        "sft",
        "SFT: accuracy",
        "share correct",
        (
            PASS1,
            GREEDY,
            Line(("evaluation/accuracy", "evaluation/exact_match"), "evaluation accuracy", BLUE, points=True),
        ),
    ),
    Panel(
        "reward",
        "Reward model",
        "share of pairs, λ",
        (
            Line(("pairwise_accuracy", "accuracy"), "pairwise accuracy", BLUE, smooth=True),
            Line(("evaluation/pairwise_accuracy",), "held-out pairwise accuracy", ORANGE, points=True),
            Line(("agrpo/lambda",), "λ", GREY),
        ),
    ),
    Panel(
        "agrpo",
        "A-GRPO: reward",
        "reward, share correct",
        (Line(("reward",), "reward", BLUE, smooth=True), PASS1, GREEDY),
    ),
    Panel("agrpo", "A-GRPO: symmetric KL", "nats / token", (Line(("agrpo/kl_symmetric",), "KL", BLUE, smooth=True),)),
    Panel("agrpo", "A-GRPO: entropy", "nats / token", (Line(("entropy",), "entropy", BLUE, smooth=True),)),
    Panel("agrpo", "A-GRPO: mean length", "tokens", (Line(("completions/mean_length",), "length", BLUE, smooth=True),)),
    Panel(
        "agrpo",
        "A-GRPO: controllers",
        "value",
        (
            Line(("agrpo/beta",), "β", BLUE),
            Line(("agrpo/epsilon",), "ε", ORANGE),
            Line(("agrpo/lambda",), "λ", GREEN),
        ),
        log=True,
    ),
)


def plot_run(run_root: Path, out: Path | None = None) -> Path:
    """Draws the stages that a run has; what was not recorded takes no room.

    Args:
        run_root: runs/<name>, with sft/, reward/ and agrpo/ or some of them.
        out: the PNG; curves.png in run_root by default.

    Raises:
        FileNotFoundError: no stage recorded anything that is drawn here.
    """
    recorded = {stage: read_series(run_root / stage / "metrics.jsonl") for stage in ("sft", "reward", "agrpo")}
    panels = [panel for panel in PANELS if any(_find(line, recorded[panel.stage]) for line in panel.lines)]
    bins = _reliability(run_root / "reward" / "result.json")
    if not panels:
        raise FileNotFoundError(f"{run_root}: no metrics to draw; there should be sft/, reward/ or agrpo/metrics.jsonl")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(panels) + bool(bins)
    columns = min(4, count)
    rows = math.ceil(count / columns)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(3.6 * columns, 2.7 * rows), squeeze=False, layout="constrained"
        )
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw(axis, panel, recorded[panel.stage])
        if bins:
            _draw_reliability(axes.flat[len(panels)], bins)
        for axis in axes.flat[count:]:
            axis.set_visible(False)
        out = out or run_root / "curves.png"
        figure.savefig(out, dpi=150)
        pyplot.close(figure)
    return out


def _reliability(result: Path) -> list[tuple[float, float, int]]:
    """The bins that stage 2 measured on held-out pairs: confidence, share right, pairs."""
    if not result.exists():
        return []
    return json.loads(result.read_text(encoding="utf-8"))["results"].get("reliability", [])


def _draw_reliability(axis, bins: list[tuple[float, float, int]]) -> None:
    most = max(count for _, _, count in bins)
    axis.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8, linestyle="--", label="calibrated")
    sure, right, counts = zip(*bins, strict=True)
    sizes = [12 + 60 * count / most for count in counts]
    axis.plot(sure, right, color=BLUE, linewidth=0.8)
    axis.scatter(sure, right, s=sizes, color=BLUE, zorder=3, label="held-out pairs")
    axis.set(
        title="Reward model: reliability", xlabel="confidence σ(s_i − s_j)", ylabel="share right", xlim=(0.49, 1.01)
    )
    axis.legend()


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to window − 1 before it: short at the start, and no lag from a made-up first value."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def _find(line: Line, series: Mapping[str, Series]) -> Series | None:
    return next((series[name] for name in line.names if name in series), None)


def _draw(axis, panel: Panel, series: Mapping[str, Series]) -> None:
    from matplotlib.ticker import LogLocator

    present = [(line, found) for line in panel.lines if (found := _find(line, series))]
    for line, (steps, values) in present:
        if line.points:
            axis.plot(steps, values, "o-", color=line.color, label=line.label, markersize=4, linewidth=0.8, zorder=3)
        elif line.smooth and len(values) >= 20:
            axis.plot(steps, values, color=line.color, alpha=0.25, linewidth=0.8)
            mean = running_mean(values, max(5, len(values) // 20))
            axis.plot(steps, mean, color=line.color, label=line.label, linewidth=1.6)
        else:
            axis.plot(steps, values, color=line.color, label=line.label, linewidth=1.4)
    if panel.log and all(value > 0 for _, (_, values) in present for value in values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    axis.set(title=panel.title, xlabel="step", ylabel=panel.unit)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlim(left=0)
    if len(present) > 1 or present[0][0].points:
        axis.legend()


def main(arguments: list[str] | None = None) -> int:
    from agrpo.reporting.dynamics import families, plot_dynamics

    parser = argparse.ArgumentParser(prog="agrpo plot", description="Draws a run's curves, or several runs' dynamics.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="a run, such as runs/quickstart")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="default: curves.png in DIR; dynamics.png here for several"
    )
    parser.add_argument(
        "--dynamics", action="store_true", help="of one run too: what learns and what adapts, as for several"
    )
    options = parser.parse_args(arguments)
    first = options.runs[0]
    try:
        if options.dynamics or len(options.runs) > 1:
            default = Path() if len(options.runs) > 1 else first
            print(plot_dynamics(families(options.runs), options.out or default / "dynamics.png"))
        else:
            print(plot_run(first, options.out))
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"drawing needs {error.name}: pip install 'agrpo[plot]'", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`agrpo theory`: how far training can move a question's pass rate, for a given β and group size.

What it computes and what it assumes is in `agrpo/algorithms/stationary.py`. It imports neither torch nor, unless it is
to draw, matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agrpo.algorithms.stationary import DIVERGENCES, reachable_pass_rate

TODAY = (0.01, 0.02, 0.05, *(step / 10 for step in range(1, 10)), 0.95, 0.98, 0.99)
LABELS = {
    "forward": "forward: KL(π_ref‖π), GRPO's",
    "reverse": "reverse: KL(π‖π_ref)",
    "symmetric": "symmetric: A-GRPO's",
}


def reachable(pass_rate: float, beta: float, group_size: float) -> dict[str, float]:
    """The stationary probability of a correct answer under each divergence."""
    return {kind: reachable_pass_rate(pass_rate, beta, group_size, kind) for kind in DIVERGENCES}


def table(rows: dict[float, dict[str, float]]) -> Table:
    """One row for each of today's pass rates."""
    view = Table("today", *DIVERGENCES, box=None, pad_edge=False, header_style="bold")
    for column in view.columns:
        column.justify = "right"
    for today, reached in rows.items():
        view.add_row(f"{today:g}", *(f"{reached[kind]:.4f}" for kind in DIVERGENCES))
    return view


def draw(beta: float, group_size: float, out: Path) -> None:
    """The reachable pass rate against today's; the suffix of `out` says which format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError, ValueError: the file cannot be written, or matplotlib does not know its suffix.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from agrpo.reporting.plots import BLUE, GREEN, GREY, ORANGE

    # Even in an angle rather than in the pass rate: the curves are steep at both ends.
    today = [math.sin(math.pi * i / 200) ** 2 for i in range(1, 100)]
    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.6,
        "legend.frameon": False,
    }
    with pyplot.rc_context(style):
        figure, axis = pyplot.subplots(figsize=(5, 4.4), layout="constrained")
        axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--", label="no change")
        for kind, color in zip(DIVERGENCES, (BLUE, ORANGE, GREEN), strict=True):
            reached = [reachable_pass_rate(rate, beta, group_size, kind) for rate in today]
            axis.plot(today, reached, color=color, linewidth=1.6, label=LABELS[kind])
        axis.set(xlabel="pass rate today", ylabel="reachable pass rate", xlim=(0, 1), ylim=(0, 1.01))
        axis.set_title(_setting(beta, group_size), loc="left", fontweight="bold", fontsize=10)
        axis.legend(loc="lower right")
        try:
            figure.savefig(out, dpi=150)
        finally:
            pyplot.close(figure)


def _setting(beta: float, group_size: float) -> str:
    return f"β = {beta:g}, groups of {group_size:g}" if math.isfinite(group_size) else f"β = {beta:g}, G → ∞"


def _number(accept: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not accept(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return parse


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="agrpo theory",
        description="How far training can move a question's pass rate: the stationary policy of one question with "
        "rewards 0 and 1, for the three divergences. docs/algorithms.md says what is assumed.",
    )
    parser.add_argument(
        "--beta",
        type=_number(lambda x: 0 <= x < math.inf, "a number, 0 or more"),
        required=True,
        metavar="B",
        help="coefficient of the divergence",
    )
    parser.add_argument(
        "--group-size",
        type=_number(lambda x: x >= 2 and (x == math.inf or x.is_integer()), "a whole number from 2, or inf"),
        required=True,
        metavar="G",
        help="completions of a prompt, or inf",
    )
    parser.add_argument(
        "--pass-rate",
        type=_number(lambda x: 0 <= x <= 1, "between 0 and 1"),
        metavar="Q",
        help="today's share of correct answers; without it, a table",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; without --pass-rate a list of rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the reachable pass rate against today's")
    options = parser.parse_args(arguments)

    chosen = TODAY if options.pass_rate is None else (options.pass_rate,)
    rows = {today: reachable(today, options.beta, options.group_size) for today in chosen}
    if options.plot is not None:
        try:
            draw(options.beta, options.group_size, options.plot)
        except ModuleNotFoundError as error:
            print(f"--plot needs {error.name}: pip install 'agrpo[plot]'", file=sys.stderr)
            return 2
        except (OSError, ValueError) as error:
            print(f"--plot {options.plot}: {error}", file=sys.stderr)
            return 2
    if options.json:
        listed = [{"pass_rate": today} | reached for today, reached in rows.items()]
        print(json.dumps(listed if options.pass_rate is None else rows[options.pass_rate]))
        return 0
    console = Console()
    console.print(f"Reachable pass rate against today's, {_setting(options.beta, options.group_size)}", highlight=False)
    console.print()
    console.print(table(rows))
    if options.plot is not None:
        console.print()
        console.print(str(options.plot), soft_wrap=True, markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

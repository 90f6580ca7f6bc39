"""A table as Markdown, CSV and LaTeX, and the tables of a comparison."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass

from agrpo.ablation.comparison import MEASURES, Comparison
from agrpo.ablation.grid import Claim
from agrpo.ablation.statistics import Estimate, detectable

SHOWN = ("win", "reward", "kl", "entropy", "length")
COMPARED = ("reward", "kl", "entropy", "advantage_variance", "length")
_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "→": r"$\to$", "×": r"$\times$",
    "≥": r"$\ge$", "≤": r"$\le$", "∞": r"$\infty$", "·": r"$\cdot$", "<": r"$<$", ">": r"$>$", "–": "--",
    "α": r"$\alpha$", "β": r"$\beta$", "ε": r"$\varepsilon$", "η": r"$\eta$", "κ": r"$\kappa$", "λ": r"$\lambda$",
    "ρ": r"$\rho$", "†": r"$\dagger$", "‡": r"$\ddagger$", "₀": r"$_0$", "π": r"$\pi$", "²": r"$^2$", "…": r"\dots{}",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Texts in rows of equal length. The first `words` columns, and one called notes, are words: the rest numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1

    def _is_words(self, column: int) -> bool:
        return column < self.words or self.columns[column] == "notes"

    def markdown(self) -> str:
        marks = ["---" if self._is_words(c) else "---:" for c in range(len(self.columns))]
        lines = [self.columns, marks, *self.rows]
        return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def latex(self) -> str:
        """A tabular for the package booktabs."""
        layout = "".join("l" if self._is_words(c) else "r" for c in range(len(self.columns)))
        lines = [" & ".join(map(latex_text, line)) + r" \\" for line in (self.columns, *self.rows)]
        body = "\n".join([lines[0], r"\midrule", *lines[1:]])
        return f"\\begin{{tabular}}{{{layout}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"


def latex_text(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)


def with_interval(estimate: Estimate | None, digits: int, sign: str = "") -> str:
    """`0.931 ± 0.012`, the half-width of the 95% interval; the mean alone of one seed, a dash of none."""
    if estimate is None:
        return "–"
    mean = f"{estimate.mean:{sign}.{digits}f}".replace("-", "−")
    return mean if math.isnan(estimate.low) else f"{mean} ± {estimate.half_width:.{digits}f}"


def p_text(p: float) -> str:
    return "–" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def main_table(found: Comparison) -> Table:
    """Every row under every method: means over seeds with their 95% t intervals, and notes."""
    heads = [f"{MEASURES[name][0]}, {MEASURES[name][2]}" for name in SHOWN]
    rows = []
    for line in found.lines:
        numbers = [with_interval(line.estimates.get(name), MEASURES[name][1]) for name in SHOWN]
        grid = found.plan.grid
        rows.append((grid.rows[line.row].label, grid.methods[line.method].label, *numbers, _notes(found, line)))
    return Table(("ablation", "method", *heads, "notes"), tuple(rows), words=2)


def _notes(found: Comparison, line) -> str:
    grid = found.plan.grid
    notes = [grid.rows[line.row].note] if grid.rows[line.row].note else []
    if line.same_as is not None:
        notes.append(f"the runs of {grid.rows[line.same_as].label}")
    if len(line.seeds) < len(grid.seeds):
        notes.append(f"{len(line.seeds)} of {len(grid.seeds)} seeds")
    return "; ".join(notes)


def number_table(found: Comparison) -> Table:
    """The numbers of the main table and the other measures in full precision, for programs."""
    heads = [f"{name}_{part}" for name in MEASURES for part in ("mean", "low", "high")]
    rows = []
    for line in found.lines:
        given = [line.estimates.get(name) for name in MEASURES]
        numbers = [_plain(x) for e in given for x in ((e.mean, e.low, e.high) if e else (math.nan,) * 3)]
        rows.append((line.row, line.method, str(len(line.seeds)), *numbers, _notes(found, line)))
    return Table(("row", "method", "seeds", *heads, "notes"), tuple(rows), words=2)


def _plain(x: float) -> str:
    return "" if math.isnan(x) else repr(float(x))


def side_by_side(found: Comparison) -> Table:
    """Baseline → method of each row, and the difference; † where its t test has p < 0.05, ‡ also after Holm."""
    grid = found.plan.grid
    heads = tuple(MEASURES[name][0] for name in COMPARED)
    rows = []
    for row, spec in grid.rows.items():
        cells = [_change(found, row, name) for name in COMPARED]
        beats = with_interval(found.beats.get(row), 3)
        rows.append((spec.label, *cells, beats))
    one, other = (grid.methods[name].label for name in (grid.method, grid.baseline))
    return Table((f"{other} → {one}", *heads, f"{one}'s wins over {other}"), tuple(rows))


def _change(found: Comparison, row: str, name: str) -> str:
    digits, difference = MEASURES[name][1], found.difference(row, name)
    if difference is None:
        return "–"
    mark = "‡" if difference.p_holm < 0.05 else "†" if difference.contrast.significant else ""
    moved = with_interval(difference.contrast.estimate, digits, "+")
    return f"{difference.baseline:.{digits}f} → {difference.method:.{digits}f} ({moved}){mark}"


def significance(found: Comparison) -> Table:
    """Each difference with its interval and p-values."""
    rows = []
    for d in found.differences:
        e, digits = d.contrast.estimate, MEASURES[d.measure][1]
        ends = [f"{x:+.{digits}f}".replace("-", "−") if not math.isnan(x) else "–" for x in (e.mean, e.low, e.high)]
        tests = (p_text(d.contrast.p_t), p_text(d.p_holm), p_text(d.contrast.p_signs))
        rows.append((MEASURES[d.measure][0], found.plan.grid.rows[d.row].label, *ends, str(e.n), *tests))
    heads = ("difference", "low", "high", "seeds", "p, paired t", "p, Holm", "p, sign flips")
    return Table(("measure", "ablation", *heads), tuple(rows), words=2)


def claim_table(found: Comparison) -> Table:
    """What is claimed, what was measured, the verdict."""
    rows = []
    for verdict in found.verdicts:
        e = verdict.estimate
        measured = "no such number" if e is None else _measured(verdict.claim, e)
        rows.append((verdict.claim.text, band(verdict.claim), measured, verdict.verdict))
    return Table(("claimed", "as a number", "measured, 95% interval", "verdict"), tuple(rows), words=4)


def band(claim: Claim) -> str:
    """`difference of KL < 0`"""
    what = {"difference": "difference of", "ratio": "relative difference of", "kept": "change within a run of"}
    low, high = (None if end is None else _number(claim, end) for end in claim.band)
    ends = f"> {low}" if high is None else f"< {high}" if low is None else f"in [{low}, {high}]"
    return f"{what[claim.compared]} {MEASURES[claim.measure][0]} {ends}"


def _number(claim: Claim, x: float) -> str:
    if claim.compared == "difference":
        text = "0" if x == 0 else f"{x:+.{MEASURES[claim.measure][1]}f}"
    else:
        text = f"{100 * x:+.0f}%"
        text = "0" if text in ("+0%", "-0%") else text
    return text.replace("-", "−")


def _measured(claim: Claim, estimate: Estimate) -> str:
    ends = [_number(claim, x) for x in (estimate.mean, estimate.low, estimate.high) if not math.isnan(x)]
    return ends[0] if len(ends) == 1 else f"{ends[0]} [{ends[1]}, {ends[2]}]"


def what_seeds_can_show(seeds: int) -> str:
    """The power of the tests, in words."""
    if seeds < 2:
        return "With fewer than two seeds that both methods have finished there are no intervals and no tests."
    return (
        f"With {seeds} seeds the paired t test finds a true difference of {detectable(seeds):.1f} times its standard"
        " deviation between seeds in 80 cases of 100; smaller ones mostly stay undecided. The sign-flip test cannot"
        f" give a p below {2 / 2**seeds:.3g}."
    )

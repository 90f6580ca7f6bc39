"""The three forms of a table, exactly."""

import csv
import io
import math

import pytest

pytest.importorskip("scipy")

from agrpo.ablation.statistics import Estimate
from agrpo.ablation.tables import Table, latex_text, p_text, with_interval

TABLE = Table(
    ("ablation", "method", "KL, nats/token", "notes"),
    (("ε low 0.1", "A-GRPO", "0.0272 ± 0.0214", "a|b, 5%"), ("no KL", "GRPO", "−0.01", '"x" & $y_1$')),
    words=2,
)


def test_markdown():
    assert TABLE.markdown() == (
        "| ablation | method | KL, nats/token | notes |\n"
        "| --- | --- | ---: | --- |\n"
        "| ε low 0.1 | A-GRPO | 0.0272 ± 0.0214 | a\\|b, 5% |\n"
        '| no KL | GRPO | −0.01 | "x" & $y_1$ |\n'
    )


def test_csv_comes_back_as_it_was():
    assert [tuple(row) for row in csv.reader(io.StringIO(TABLE.csv()))] == [TABLE.columns, *TABLE.rows]


def test_latex():
    assert TABLE.latex() == (
        "\\begin{tabular}{llrl}\n\\toprule\n"
        "ablation & method & KL, nats/token & notes \\\\\n\\midrule\n"
        "$\\varepsilon$ low 0.1 & A-GRPO & 0.0272 $\\pm$ 0.0214 & a|b, 5\\% \\\\\n"
        'no KL & GRPO & $-$0.01 & "x" \\& \\$y\\_1\\$ \\\\\n'
        "\\bottomrule\n\\end{tabular}\n"
    )
    assert latex_text("\\{}^~#") == "\\textbackslash{}\\{\\}\\textasciicircum{}\\textasciitilde{}\\#"


def test_numbers_as_text():
    assert with_interval(Estimate(0.9312, 0.9192, 0.9432, 3), 3) == "0.931 ± 0.012"
    assert with_interval(Estimate(-0.5, -0.6, -0.4, 3), 2, "+") == "−0.50 ± 0.10"
    assert with_interval(Estimate(0.5, math.nan, math.nan, 1), 1) == "0.5"
    assert with_interval(None, 1) == "–"
    assert [p_text(p) for p in (0.04999, 0.0005, math.nan)] == ["0.050", "<0.001", "–"]

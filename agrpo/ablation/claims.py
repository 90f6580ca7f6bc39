"""A claim beside what was measured: confirmed, refuted or undecided, by one rule.

A claim is a band for a number: `difference`, method − baseline of the full row; `ratio`, method/baseline − 1; `kept`,
the method's own end/start − 1 within a run. What was measured is the number's 95% t interval, paired over seeds, of
ratios in their logarithms. The interval inside the band confirms; the interval outside it refutes; else, and with one
seed, the claim is undecided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agrpo.ablation.grid import Claim
from agrpo.ablation.statistics import Estimate, t_interval

CONFIRMED, REFUTED, UNDECIDED = "confirmed", "refuted", "undecided"


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    verdict: str
    estimate: Estimate | None  # None: the number does not exist, such as the ratio to 0


def judge(claim: Claim, measured: Estimate | None) -> Verdict:
    """The rule above. An interval that only touches an end of the band from outside refutes nothing."""
    if measured is None or math.isnan(measured.low):
        return Verdict(claim, UNDECIDED, measured)
    low, high = (-math.inf if claim.band[0] is None else claim.band[0], claim.band[1])
    high = math.inf if high is None else high
    if low < measured.low and measured.high < high:
        return Verdict(claim, CONFIRMED, measured)
    outside = measured.high < low or measured.low > high
    return Verdict(claim, REFUTED if outside else UNDECIDED, measured)


def number_of(
    claim: Claim,
    baseline: Sequence[float],
    method: Sequence[float],
    started: Sequence[float],
    ended: Sequence[float],
) -> Estimate | None:
    """The claim's number, over seeds.

    Args:
        baseline, method: the measure of the full row, seed by seed.
        started, ended: of the method's runs, the same at their first and their last steps.
    """
    if claim.compared == "difference":
        return t_interval([m - b for b, m in zip(baseline, method, strict=True)])
    below, above = (baseline, method) if claim.compared == "ratio" else (started, ended)
    if min([*below, *above]) <= 0:
        return None
    logs = t_interval([math.log(a / b) for b, a in zip(below, above, strict=True)])
    return Estimate(math.expm1(logs.mean), math.expm1(logs.low), math.expm1(logs.high), logs.n)


def judge_all(claims: Sequence[Claim], measures: Mapping[str, tuple[Sequence[float], ...]]) -> list[Verdict]:
    """Every claim's verdict; `measures` has `number_of`'s four sequences by the measure's name."""
    return [judge(claim, number_of(claim, *measures[claim.measure])) for claim in claims]

"""Means over seeds: intervals, paired tests, and what so many seeds can show at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from scipy import integrate, optimize, stats

LEVEL = 0.95
_MOST_SIGNS = 16  # 2^16 patterns are enumerated at once


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds with its interval; the ends are NaN where one seed says nothing of the spread."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Contrast:
    """A difference between two methods, paired over seeds."""

    estimate: Estimate
    p_t: float  # two-sided, of the paired t test; NaN for one seed
    p_signs: float  # two-sided, exact, of the sign-flip test

    @property
    def significant(self) -> bool:
        return self.p_t < 1 - LEVEL


def t_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Student's interval of a mean: exact where the values are drawn independently from one normal distribution.

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def contrast(differences: Sequence[float]) -> Contrast:
    """Paired differences against 0.

    The t test is what a few seeds have power for, at the price of assuming that differences are normal; the sign-flip
    test assumes only that they are symmetric about 0, and cannot go below 2/2^n.
    """
    estimate = t_interval(differences)
    return Contrast(estimate, _p_t(estimate, differences), sign_flip_p(differences))


def _p_t(estimate: Estimate, differences: Sequence[float]) -> float:
    if estimate.n == 1:
        return math.nan
    deviation = math.sqrt(math.fsum((x - estimate.mean) ** 2 for x in differences) / (estimate.n - 1))
    if deviation == 0:
        return 1.0 if estimate.mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(estimate.mean) / (deviation / math.sqrt(estimate.n)), estimate.n - 1))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact two-sided p: the share of the 2^n ways to choose signs whose sum is as far from 0 as the observed one.

    Raises:
        ValueError: no differences, or more than can be enumerated.
    """
    if not 1 <= len(differences) <= _MOST_SIGNS:
        raise ValueError(f"the sign-flip test enumerates 1 to {_MOST_SIGNS} differences, got {len(differences)}")
    observed = abs(math.fsum(differences))
    tolerance = 1e-9 * math.fsum(map(abs, differences))
    patterns = product((1, -1), repeat=len(differences))
    sums = [abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) for signs in patterns]
    return sum(total >= observed - tolerance for total in sums) / len(sums)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for having looked at all of them (Holm 1979), in the order given; NaN stays and counts not."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def power(effect: float, n: int, level: float = LEVEL) -> float:
    """How often the paired t test of n seeds sees a true mean difference of `effect` standard deviations."""
    if n < 2:
        return 0.0
    freedom, shift = n - 1, effect * math.sqrt(n)
    critical = float(stats.t.ppf((1 + level) / 2, freedom))

    def seen(spread: float) -> float:
        """Weighted by the density of the estimated deviation, which is spread/√freedom of the true one."""
        edge = critical * spread / math.sqrt(freedom)
        return stats.chi.pdf(spread, freedom) * (stats.norm.sf(edge - shift) + stats.norm.cdf(-edge - shift))

    return float(integrate.quad(seen, 0, math.sqrt(freedom) + 12)[0])  # χ is within √freedom + 12 but for 1e-30


def detectable(n: int, wanted: float = 0.8, level: float = LEVEL) -> float:
    """The true difference, in its standard deviations over seeds, that n seeds see with the wanted power."""
    if n < 2:
        return math.inf
    most = 20 / math.sqrt(n)  # twenty standard errors: enough for two seeds
    return float(optimize.brentq(lambda effect: power(effect, n, level) - wanted, 1e-3, most))

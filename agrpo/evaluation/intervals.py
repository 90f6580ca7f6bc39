"""Uncertainty of a mean over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def bootstrap_interval(
    values: Sequence[float], weights: Sequence[float] | None = None, *, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling prompts; the same values give the same interval.

    Args:
        weights: of the values in the mean, drawn together with them; all alike by default.

    Raises:
        ValueError: no values.
    """
    if len(values) == 0:
        raise ValueError("an interval needs at least one value")
    data = np.asarray(values, dtype=np.float64)
    mass = np.ones_like(data) if weights is None else np.asarray(weights, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(data), size=(resamples, len(data)))
    means = (data * mass)[draws].sum(1) / mass[draws].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(passes: float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of n independent outcomes; it has a width at 0 and at n too.

    Raises:
        ValueError: no outcomes.

    Source: Wilson 1927; the p at which |p̂ − p| = z·√(p(1 − p)/n).
    """
    if n < 1:
        raise ValueError("an interval needs at least one value")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = passes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / n + spread / (4 * n)) ** 0.5
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding, at 0 and 1


def share_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Of the mean of values in [0, 1]: Wilson's where each is 0 or 1, else the bootstrap over them."""
    if all(value in (0, 1) for value in values):
        return wilson_interval(sum(values), len(values), level=level)
    return bootstrap_interval(values, level=level)

"""Uncertainty of a mean over prompts."""

from __future__ import annotations

from collections.abc import Sequence

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

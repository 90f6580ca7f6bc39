"""Uncertainty of a mean over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap_interval(values: Sequence[float], *, level: float = 0.95, resamples: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling prompts; the same values give the same interval.

    Raises:
        ValueError: no values.
    """
    if len(values) == 0:
        raise ValueError("an interval needs at least one value")
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(data), size=(resamples, len(data)))
    low, high = np.quantile(data[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

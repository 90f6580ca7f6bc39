"""Steps whose loss or gradient stands far out of the ones before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from statistics import median

_WATCHED = ("loss", "grad_norm")


class Spikes:
    """Tells of a value that lies `factor` times as far from the median of the last `window` as they do themselves.

    Their own distance is the median one. Nothing is told until half a window is seen.
    """

    def __init__(self, window: int = 32, factor: float = 15.0) -> None:
        self._factor, self._least = factor, window // 2
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=window) for name in _WATCHED}

    def observe(self, step: int, metrics: Mapping[str, float]) -> Iterator[str]:
        for name, seen in self._seen.items():
            value = metrics.get(name, math.nan)
            if not math.isfinite(value):
                continue
            if len(seen) >= self._least:
                middle = median(seen)
                usual = median(abs(other - middle) for other in seen)
                if abs(value - middle) > self._factor * max(usual, 1e-3 * abs(middle), 1e-8):
                    yield (
                        f"step {step}: {name} {value:.4g} stands out of the last {len(seen)} steps' {middle:.4g}"
                        f" ± {usual:.2g}: look at this step in samples.jsonl; if it comes again, lower"
                        " training.learning_rate"
                    )
            seen.append(value)

"""Steps whose loss or gradient stands far out of the ones before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from statistics import median

_WATCHED = ("loss", "grad_norm")


class Spikes:
    """Tells of a value far from the median of the last `window`: `factor` times as far as half of them are, and three
    times as far as any. Nothing is told until half a window is seen.
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
                distances = [abs(other - middle) for other in seen]
                usual = median(distances)
                if abs(value - middle) > max(self._factor * usual, 3 * max(distances), 1e-2 * abs(middle), 1e-6):
                    yield (
                        f"step {step}: {name} {value:.4g} stands out of the last {len(seen)} steps' {middle:.4g}"
                        f" ± {usual:.2g}: look at this step in samples.jsonl; if it comes again, lower"
                        " training.learning_rate"
                    )
            seen.append(value)

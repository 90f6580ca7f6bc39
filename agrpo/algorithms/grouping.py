"""How many completions each prompt gets, and how many of them are kept. Plain numbers: no tensor is needed.

Legend: P prompts of a step; G completions of one of them.
"""

import heapq
import math
from collections.abc import Sequence


def pass_deviation(passes: int, count: int, prior: float = 1.0) -> float:
    """√(p̂(1 − p̂)) of a prompt's outcome, p̂ = (passes + a)/(count + 2a) its Beta(a, a) posterior mean.

    Args:
        passes, count: completions that passed, and completions sampled.
        prior: a > 0. Without it a pilot of two that agree would never be looked at again.

    Returns:
        In (0, ½].

    Raises:
        ValueError: the prior is not positive.
    """
    if not prior > 0:
        raise ValueError(f"the prior must be positive, got {prior}: it keeps agreeing pilots open")
    p = (passes + prior) / (count + 2 * prior)
    return math.sqrt(p * (1 - p))


def neyman_allocation(deviation: Sequence[float], budget: int, least: int, most: int) -> list[int]:
    """Completions of each prompt that make the summed variance of the prompts' mean rewards least.

    min Σ σ_p²/n_p over whole numbers least ≤ n_p ≤ most with Σ n_p = budget. Where no bound holds, n_p is proportional
    to σ_p, up to rounding (Neyman 1934). The whole-number optimum is greedy: the next completion goes to the prompt
    with the largest σ/√(n(n + 1)), whose variance falls most (Wright 2012). Ties go to the smaller group, then to the
    earlier prompt.

    Args:
        deviation: (P,) σ ≥ 0 of a prompt's reward. Prompts without any are served last, evenly.
        budget: completions of all prompts together; it is capped to P·most.
        least, most: bounds of one prompt, 1 ≤ least ≤ most.

    Returns:
        (P,) whole numbers that sum to the budget, or to P·most where that is less.

    Raises:
        ValueError: bounds out of order, a budget below P·least, or a deviation that is negative or NaN.
    """
    prompts = len(deviation)
    if not 1 <= least <= most:
        raise ValueError(f"needs 1 ≤ least ≤ most, got {least} and {most}")
    if budget < prompts * least:
        raise ValueError(f"a budget of {budget} completions cannot give {prompts} prompts {least} each")
    if not all(sigma >= 0 for sigma in deviation):
        raise ValueError(f"deviations must be 0 or more, got {list(deviation)}")
    counts = [least] * prompts

    def rank(p: int) -> tuple[float, int, int]:
        n = counts[p]
        return -deviation[p] / math.sqrt(n * (n + 1)), n, p

    waiting = [rank(p) for p in range(prompts) if most > least]
    heapq.heapify(waiting)
    for _ in range(min(budget, prompts * most) - prompts * least):
        p = heapq.heappop(waiting)[2]
        counts[p] += 1
        if counts[p] < most:
            heapq.heappush(waiting, rank(p))
    return counts


def kept_of(size: int, rate: float) -> int:
    """⌈(1 − p)·size⌉, how many of `size` completions pruning at the rate p leaves.

    Raises:
        ValueError: rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the pruning rate must be in [0, 1), got {rate}")
    # size − ⌊p·size⌋ rather than ⌈(1 − p)·size⌉: in floats (1 − 0.7)·10 is above 3, and 0.29·100 is below 29.
    return size - math.floor(rate * size + 1e-9)

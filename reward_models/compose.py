"""Several rewards as one table of scores. A reward that fails costs its own column, never the run."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from agrpo.types import Reward, Text


class RewardSet:
    """K rewards with weights. `errors` counts, by reward, the scores lost since `take_errors` was last called.

    `first_error` keeps, by reward, the first reason as text for the log: a traceback, or what was wrong with a value.
    """

    def __init__(self, specs: Sequence[tuple[str, Reward, float]]) -> None:
        if not specs:
            raise ValueError("a run needs at least one reward")
        for name, _, weight in specs:
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} is {weight}, not a finite number")
        self.names: tuple[str, ...] = _unique([name for name, _, _ in specs])
        self.rewards: tuple[Reward, ...] = tuple(reward for _, reward, _ in specs)
        self.weights: Tensor = torch.tensor([weight for _, _, weight in specs], dtype=torch.float32)  # (K,)
        self.errors: Counter[str] = Counter()
        self.first_error: dict[str, str] = {}

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """(N, K) float32. NaN where a reward abstained, and, counted in `errors`, where it raised or gave no number.

        Args:
            columns: one sequence of N values a column, handed to every reward by name.
        """
        scores = torch.full((len(completions), len(self.names)), math.nan)  # (N, K)
        for k, (name, reward) in enumerate(zip(self.names, self.rewards, strict=True)):
            try:
                values = list(
                    reward(
                        prompts=list(prompts),
                        completions=list(completions),
                        completion_ids=[list(ids) for ids in completion_ids],
                        **{column: list(values) for column, values in columns.items()},  # its own to change
                    )
                )
                if len(values) != len(completions):
                    raise ValueError(f"{len(values)} scores for {len(completions)} completions")
            except Exception:  # a user's reward: it may raise anything, and the other columns still count
                self._count(name, len(completions), traceback.format_exc())
                continue
            scores[:, k] = torch.tensor([self._number(name, value) for value in values])
        return scores

    def total(self, scores: Tensor) -> Tensor:
        """(N, K) → (N,) weighted sum over the rewards that scored; NaN where none did. Abstaining is not scoring 0."""
        scored = ~scores.isnan()  # (N, K)
        total = (scores.nan_to_num(nan=0.0) * self.weights.to(scores)).sum(-1)  # (N,)
        return total.masked_fill(~scored.any(-1), math.nan)

    def all_failed(self, scores: Tensor) -> bool:
        """Whether no reward scored any completion: nothing can be learned, and the loop should stop and say why."""
        return bool(scores.isnan().all())

    def take_errors(self) -> dict[str, int]:
        """Lost scores by reward since the last call, and start anew."""
        taken, self.errors = dict(self.errors), Counter()
        return taken

    def _number(self, name: str, value: Any) -> float:
        if value is None:
            return math.nan
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or abs(number) > torch.finfo(torch.float32).max:
            self._count(name, 1, f"a score of {str(value)[:100]!r} is not a finite number")
            return math.nan
        return number

    def _count(self, name: str, scores: int, reason: str) -> None:
        self.errors[name] += scores
        self.first_error.setdefault(name, reason)


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """The names, the second of a name with -2 behind it, the third with -3."""
    taken: list[str] = []
    for name in names:
        candidate, count = name, 1
        while candidate in taken or (count > 1 and candidate in names):
            count += 1
            candidate = f"{name}-{count}"
        taken.append(candidate)
    return tuple(taken)

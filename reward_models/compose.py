"""Several rewards as one table of scores, and one number of each row. A reward that fails costs its own column, never
the run."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from reward_models.early import Early, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from agrpo.types import Reward, Text


class Gate(NamedTuple):
    """A reward counts only where another one scored at least so much."""

    reward: str  # the other's name
    at_least: float = 1.0
    otherwise: float = 0.0  # what counts instead


class Entry(NamedTuple):
    """A reward's place in a set."""

    name: str
    reward: Reward
    weight: float = 1.0
    normalise: bool = False  # by the mean and deviation of what it has scored so far in the run
    gate: Gate | None = None


class RewardSet:
    """K rewards with weights. `errors` counts, by reward, the scores lost since `take_errors` was last called.

    `first_error` keeps, by reward, the first reason as text for the log: a traceback, or what was wrong with a value.
    Running statistics of the scores are the only state, and belong into the checkpoint.

    Args:
        entries: of the rewards, or their fields as tuples.

    Raises:
        ValueError: no reward, a weight that is not finite, a gate that no other reward of the set is, or a
            `while_sampling` that says nothing known.
    """

    def __init__(self, entries: Sequence[Entry | tuple]) -> None:
        self.entries = [Entry(*entry) for entry in entries]
        if not self.entries:
            raise ValueError("a run needs at least one reward")
        for entry in self.entries:
            if not math.isfinite(entry.weight):
                raise ValueError(f"the weight of reward {entry.name!r} is {entry.weight}, not a finite number")
            _check_while_sampling(entry)
            others = [other.name for other in self.entries if other is not entry]
            if entry.gate is not None and entry.gate.reward not in others:
                raise ValueError(f"the gate of reward {entry.name!r} is {entry.gate.reward!r}, none of {others}")
        self.names: tuple[str, ...] = _unique([entry.name for entry in self.entries])
        self.rewards: tuple[Reward, ...] = tuple(entry.reward for entry in self.entries)
        self.weights: Tensor = torch.tensor([entry.weight for entry in self.entries], dtype=torch.float32)  # (K,)
        self.errors: Counter[str] = Counter()
        self.first_error: dict[str, str] = {}
        self._summed: dict[int, dict[str, float]] = {}  # metrics of a reward whose last scores took several calls
        self._count = torch.zeros(len(self.entries), dtype=torch.float64)  # (K,) scores seen
        self._mean = torch.zeros_like(self._count)
        self._square = torch.zeros_like(self._count)  # summed squared distance from the mean

    def begin(self, prompts: Sequence[Text], columns: Mapping[str, Sequence[Any]]) -> Early | None:
        """For the rewards that can score a rollout's completions as they end; None where no reward of the set can.

        Args:
            prompts, columns: of the N completions to come; `finished` is not known yet.
        """
        waiting = {k: one for k, one in enumerate(self.rewards) if getattr(one, "while_sampling", None)}
        return Early(waiting, prompts, columns) if waiting else None

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        early: Early | None = None,
    ) -> Tensor:
        """(N, K) float32. NaN where a reward abstained, and, counted in `errors`, where it raised or gave no number.

        Args:
            columns: one sequence of N values a column, handed to every reward by name.
            early: what was scored before all were there; it changes no score.
        """
        rows = Rows(prompts, completions, completion_ids, columns)
        scores = torch.full((len(completions), len(self.names)), math.nan)  # (N, K)
        self._summed = {}
        for k, (name, reward) in enumerate(zip(self.names, self.rewards, strict=True)):
            known = None if early is None else early.values(k, rows)
            try:
                values, self._summed[k] = known or (rows.ask(reward, range(len(completions))), None)
            except Exception:  # a user's reward: it may raise anything, and the other columns still count
                self._lose(name, len(completions), traceback.format_exc())
                continue
            scores[:, k] = torch.tensor([self._number(name, value) for value in values])
        return scores

    def shaped(self, scores: Tensor) -> Tensor:
        """(N, K) → (N, K) scores as they count: normalised where asked for, and gated. NaN stays, also of a gate."""
        columns = []
        for k, entry in enumerate(self.entries):
            column = scores[:, k]
            if entry.normalise and self._count[k] > 1:
                deviation = float((self._square[k] / self._count[k]).sqrt())
                column = (column - float(self._mean[k])) / max(deviation, 1e-6)
            if entry.gate is not None:
                key = scores[:, [e.name for e in self.entries].index(entry.gate.reward)]
                column = torch.where(key < entry.gate.at_least, entry.gate.otherwise, column)
                column = column.masked_fill(key.isnan(), math.nan)
            columns.append(column)
        return torch.stack(columns, 1)

    def total(self, scores: Tensor) -> Tensor:
        """(N, K) → (N,) weighted sum over the rewards that scored; NaN where none did. Abstaining is not scoring 0."""
        shaped = self.shaped(scores)
        scored = ~shaped.isnan()  # (N, K)
        total = (shaped.nan_to_num(nan=0.0) * self.weights.to(scores)).sum(-1)  # (N,)
        return total.masked_fill(~scored.any(-1), math.nan)

    def observe(self, scores: Tensor) -> None:
        """Take a step's (N, K) scores, of all ranks, into the running statistics."""
        for k, column in enumerate(scores.double().unbind(1)):
            seen = column[column.isfinite()]
            if len(seen) == 0:
                continue
            count = self._count[k] + len(seen)
            shift = seen.mean() - self._mean[k]  # two batches' moments put together (Chan et al. 1979)
            self._square[k] += (seen - seen.mean()).square().sum() + shift**2 * self._count[k] * len(seen) / count
            self._mean[k] += shift * len(seen) / count
            self._count[k] = count

    def metrics(self) -> dict[str, float]:
        """What rewards tell of their last call beside the scores, as `<name>/<key>`: always the same keys."""
        return {
            f"{name}/{key}": float(value)
            for k, (name, reward) in enumerate(zip(self.names, self.rewards, strict=True))
            for key, value in (self._summed.get(k) or getattr(reward, "metrics", {})).items()
        }

    def state_dict(self) -> dict[str, list[float]]:
        moments = {"count": self._count, "mean": self._mean, "square": self._square}
        return {name: values.tolist() for name, values in moments.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self._count, self._mean, self._square = (
            torch.tensor(state[name], dtype=torch.float64) for name in ("count", "mean", "square")
        )

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
            self._lose(name, 1, f"a score of {str(value)[:100]!r} is not a finite number")
            return math.nan
        return number

    def _lose(self, name: str, scores: int, reason: str) -> None:
        self.errors[name] += scores
        self.first_error.setdefault(name, reason)


def _check_while_sampling(entry: Entry) -> None:
    how = getattr(entry.reward, "while_sampling", None)
    if how and how != "prompt" and not (isinstance(how, int) and how > 0):
        raise ValueError(
            f"reward {entry.name!r}: while_sampling is {how!r}, neither 'prompt' nor a number of completions"
        )


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

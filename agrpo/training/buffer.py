"""The rollout in use: what a run that stops between two updates of it needs to go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from agrpo.training.rollouts import rollout_from_state, rollout_state
from agrpo.types import Experience

_TENSORS = ("scores", "rewards", "advantages", "reference", "values", "returns")


class Buffer:
    """One step's experience, the metrics so far, and how far its updates are.

    It is in the checkpoint only while it is in use: after the last update nothing of it is left to learn.

    Args:
        pause: called between two updates with how many are done; may end the run.
    """

    def __init__(self, pause: Callable[[int], None] = lambda updates: None) -> None:
        self._pause = pause
        self.clear()

    def clear(self) -> None:
        self.experience: Experience | None = None
        self.metrics: dict[str, float] = {}
        self.updates = 0  # done
        self._update_metrics: dict[str, float] = {}
        self._corrected: Counter[str] = Counter()
        self._old = self._weights = torch.zeros(0)  # (C,) over the micro-batches, each token's

    def fill(self, experience: Experience, metrics: dict[str, float]) -> None:
        """A new step: its experience before pruning, and the metrics of how it was sampled."""
        self.clear()
        self.experience, self.metrics = experience, metrics

    @property
    def in_use(self) -> bool:
        return self.updates > 0

    def after_update(
        self,
        updates: int,
        old: Sequence[Tensor],
        weights: Sequence[Tensor],
        metrics: dict[str, float],
        corrected: Counter[str],
    ) -> None:
        """`updates` are done, and more will come: a place to stop."""
        self.updates, self._update_metrics, self._corrected = updates, metrics, corrected
        self._old, self._weights = torch.cat(list(old)), torch.cat(list(weights))
        self._pause(updates)

    def resume(
        self, old: list[Tensor | None], weights: list[Tensor], sizes: Sequence[int]
    ) -> tuple[int, dict[str, float], Counter[str]]:
        """Bring `old` and `weights`, of micro-batches with these numbers of tokens, to where the updates stand."""
        if self.in_use:
            device = weights[0].device
            old[:] = self._old.to(device).split(list(sizes))
            weights[:] = self._weights.to(device).split(list(sizes))
        return self.updates, dict(self._update_metrics), Counter(self._corrected)

    def state_dict(self) -> dict[str, Any]:
        if not self.in_use:
            return {}
        return {
            "rollout": rollout_state(self.experience.rollout),
            **{name: getattr(self.experience, name) for name in _TENSORS},
            "metrics": {name: float(value) for name, value in self.metrics.items()},
            "updates": self.updates,
            "update_metrics": {name: float(value) for name, value in self._update_metrics.items()},
            "corrected": dict(self._corrected),
            "old": self._old,
            "weights": self._weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clear()
        if not state:
            return
        self.experience = Experience(rollout_from_state(state["rollout"]), **{name: state[name] for name in _TENSORS})
        self.metrics, self.updates = state["metrics"], state["updates"]
        self._update_metrics, self._corrected = state["update_metrics"], Counter(state["corrected"])
        self._old, self._weights = state["old"], state["weights"]

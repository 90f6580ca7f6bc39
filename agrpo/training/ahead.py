"""Rollouts one step ahead: the next step's completions are sampled while this step updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from agrpo.engine import distributed
from agrpo.types import Prompt, Rollout

_TENSORS = {"group": torch.long, "lengths": torch.long, "tokens": torch.long, "logp": torch.float32}
_TENSORS |= {"finished": torch.bool}


@dataclass(frozen=True)
class Pending:
    """A rollout that has been begun."""

    pairs: Sequence[tuple[int, int]]  # (slot, index into the data) of its prompts
    wait: Callable[[], Rollout]


class StepAhead:
    """The rollout at hand is taken, and the next one begun, before the update: a step learns from the weights that the
    step before began with. The first step has no step before: its weights are its own.

    A checkpoint holds the rollout that waits, since the weights that sampled it are gone by then.

    Args:
        steps: of the run; none is begun for a step behind the last.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._pending: Pending | None = None

    def take(self, step: int, begin: Callable[[int], Pending]) -> Rollout:
        """This step's rollout; `begin` starts that of a step with the weights as they are now."""
        rollout = (self._pending or begin(step)).wait()
        self._pending = begin(step + 1) if step + 1 < self.steps else None
        return rollout

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks, JSON values; waits for what is being sampled. Every rank must call it."""
        own = None
        if self._pending is not None:
            rollout = self._pending.wait()
            own = {name: getattr(rollout, name).tolist() for name in _TENSORS}
            own |= {"pairs": [list(pair) for pair in self._pending.pairs], "texts": list(rollout.texts)}
            own |= {"weight_version": rollout.weight_version}
        return {"pending": distributed.gather_objects(own)}

    def load_state_dict(self, state: dict[str, Any], prompts: Sequence[Prompt]) -> None:
        """Have the rollout back that waited when `state` was taken; `prompts` are all prompts of the data."""
        own = state["pending"][distributed.rank()]
        if own is None:
            self._pending = None
            return
        pairs = [(slot, index) for slot, index in own["pairs"]]
        rollout = Rollout(
            prompts=tuple(prompts_at(prompts, pairs)),
            texts=tuple(own["texts"]),
            weight_version=own["weight_version"],
            **{name: torch.tensor(own[name], dtype=dtype) for name, dtype in _TENSORS.items()},
        )
        self._pending = Pending(pairs, lambda: rollout)


def prompts_at(prompts: Sequence[Prompt], pairs: Sequence[tuple[int, int]]) -> list[Prompt]:
    """The prompts with these indices, each with its slot of the step."""
    return [Prompt(prompts[i].text, prompts[i].ids, slot, prompts[i].columns) for slot, i in pairs]

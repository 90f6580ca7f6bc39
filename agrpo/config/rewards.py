"""Rewards, by import path."""

from __future__ import annotations

import importlib.util
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from agrpo.config.base import Section


class GateConfig(Section):
    """A reward counts only where another one scored at least so much."""

    reward: str  # the other's name
    at_least: float = 1.0
    otherwise: float = 0.0  # what counts instead


class RewardSpec(BaseModel):
    """A reward by import path. Keys beyond these are parameters of the reward itself."""

    model_config = ConfigDict(extra="allow", frozen=True)
    target: str
    weight: float = 1.0
    name: str | None = None
    normalise: bool = False  # by the mean and deviation of what it has scored so far
    gate: GateConfig | None = None

    @property
    def label(self) -> str:
        return self.name or self.target.replace(":", ".").rsplit(".", 1)[-1]

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _importable(self) -> Self:
        package = self.target.replace(":", ".").split(".")[0]
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"target: no module {package!r} can be found for {self.target!r}; is its folder on PYTHONPATH?"
            )
        return self


def check_names(rewards: list[RewardSpec]) -> None:
    names = [spec.label for spec in rewards]
    if len(set(names)) < len(names):
        raise ValueError(f"rewards: two have the same name in {names}; tell them apart with name:")
    for spec in rewards:
        others = [name for name in names if name != spec.label]
        if spec.gate is not None and spec.gate.reward not in others:
            raise ValueError(f"rewards: the gate of {spec.label} is {spec.gate.reward!r}, which is none of {others}")

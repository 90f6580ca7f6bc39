"""Rewards, by import path."""

from __future__ import annotations

from agrpo.config.base import Section, Target


class GateConfig(Section):
    """A reward counts only where another one scored at least so much."""

    reward: str  # the other's name
    at_least: float = 1.0
    otherwise: float = 0.0  # what counts instead


class RewardSpec(Target):
    """A reward by import path. Keys beyond these are parameters of the reward itself."""

    weight: float = 1.0
    name: str | None = None
    normalise: bool = False  # by the mean and deviation of what it has scored so far
    gate: GateConfig | None = None

    @property
    def label(self) -> str:
        return self.name or self.target.replace(":", ".").rsplit(".", 1)[-1]


def check_names(rewards: list[RewardSpec]) -> None:
    names = [spec.label for spec in rewards]
    if len(set(names)) < len(names):
        raise ValueError(f"rewards: two have the same name in {names}; tell them apart with name:")
    for spec in rewards:
        others = [name for name in names if name != spec.label]
        if spec.gate is not None and spec.gate.reward not in others:
            raise ValueError(f"rewards: the gate of {spec.label} is {spec.gate.reward!r}, which is none of {others}")

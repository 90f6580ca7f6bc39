"""The coefficients of a run that move: β, ε, λ, η and the scale of the rewards, together in one state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from agrpo.algorithms.controllers import AdaptiveBeta, AdaptiveEntropy, AdaptiveEpsilon, AdaptiveLambda, Fixed
from agrpo.config import LambdaController, PolicyConfig
from agrpo.training.update import Coefficients


@dataclass
class RunningScale:
    """Running deviation of the rewards, bias-corrected: the unit in which a reward difference becomes a confidence."""

    decay: float = 0.9
    average: float = 0.0
    observations: int = 0

    @property
    def value(self) -> float:
        if self.observations == 0:
            return 1.0
        return max(1e-6, self.average / (1 - self.decay**self.observations))

    def observe(self, deviation: float) -> None:
        if math.isfinite(deviation) and deviation > 0:
            self.average = self.decay * self.average + (1 - self.decay) * deviation
            self.observations += 1

    def state_dict(self) -> dict[str, float]:
        return {"average": self.average, "observations": self.observations}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.average, self.observations = state["average"], int(state["observations"])


def out_of_reach(target: float, metrics: dict[str, float]) -> str | None:
    """Why an adaptive λ cannot bring the uncertainty down to its target, in words; None where it may."""
    floor = metrics.get("agrpo/label_entropy", 0.0)
    if floor < target:
        return None
    return (
        f"λ's target {target} is not above the labels' own mean entropy, {floor:.3f}: soft labels keep the uncertainty"
        " there and λ will stay at its upper bound; raise the target"
    )


def lambda_controller(config: LambdaController) -> AdaptiveLambda | Fixed:
    if config.kind == "fixed":
        return Fixed(config.value)
    return AdaptiveLambda(target=config.target, gain=config.gain, value=config.value, bounds=config.bounds)


class Controllers:
    """What adapts during policy optimisation. `notes` says in words what is inert in this configuration."""

    def __init__(self, config: PolicyConfig) -> None:
        objective, chosen = config.objective, config.controllers
        self.notes: list[str] = []
        self.beta: AdaptiveBeta | Fixed = Fixed(objective.beta if objective.kl != "none" else 0.0)
        if chosen.beta.kind == "adaptive" and objective.kl != "none":
            c = chosen.beta
            self.beta = AdaptiveBeta(target=c.target, gain=c.gain, value=objective.beta, bounds=c.bounds, decay=c.decay)
        self.epsilon: AdaptiveEpsilon | Fixed = Fixed(objective.epsilon_low)
        if objective.updates_per_rollout == 1:
            self.notes.append("ε inert: with one update a rollout the ratio is 1 and nothing is clipped")
        elif not objective.clip:
            self.notes.append("ε inert: objective.clip is false")
        elif chosen.epsilon.kind == "adaptive":
            target = chosen.epsilon.target or objective.epsilon_low**2 / 8
            c = chosen.epsilon
            self.epsilon = AdaptiveEpsilon(target=target, gain=c.gain, value=objective.epsilon_low, bounds=c.bounds)
        self.lambda_ = lambda_controller(chosen.lambda_)
        self.entropy: AdaptiveEntropy | Fixed = Fixed(objective.entropy_coef)
        if chosen.entropy.kind == "adaptive":
            c = chosen.entropy
            self.entropy = AdaptiveEntropy(target=c.target, gain=c.gain, value=objective.entropy_coef, bounds=c.bounds)
        self.scale = RunningScale()
        self._warned = False

    def coefficients(self) -> Coefficients:
        return Coefficients(
            self.beta.value, self.epsilon.value, self.lambda_.value, self.entropy.value, self.scale.value
        )

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """After the step, on numbers of all ranks. Returns what is worth saying of it, once a run, in words."""
        self.beta.observe(metrics["agrpo/kl_symmetric"])
        self.epsilon.observe(metrics["agrpo/kl_update"])
        self.lambda_.observe(metrics.get("agrpo/uncertainty", math.nan))
        self.entropy.observe(metrics["entropy"])
        self.scale.observe(metrics["reward_std"])
        warning = out_of_reach(self.lambda_.target, metrics) if isinstance(self.lambda_, AdaptiveLambda) else None
        if warning is None or self._warned:
            return []
        self._warned = True
        return [warning]

    def metrics(self) -> dict[str, float]:
        return {
            "agrpo/beta": self.beta.value,
            "agrpo/epsilon": self.epsilon.value,
            "agrpo/lambda": self.lambda_.value,
            "agrpo/entropy_coef": self.entropy.value,
            "agrpo/reward_scale": self.scale.value,
        }

    def _parts(self) -> dict[str, Any]:
        return {
            "beta": self.beta,
            "epsilon": self.epsilon,
            "lambda": self.lambda_,
            "entropy": self.entropy,
            "scale": self.scale,
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

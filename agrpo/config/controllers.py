"""What adapts while a run learns."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from agrpo.algorithms.controllers import check_beta_gain
from agrpo.config.base import Fraction, Positive, Section


class BetaController(Section):
    kind: Literal["fixed", "adaptive"] = "adaptive"
    target: Positive = 0.05  # symmetric KL, nats a token
    gain: Positive = 0.02
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    bounds: tuple[Positive, Positive] = (1e-4, 1.0)


class EpsilonController(Section):
    kind: Literal["fixed", "adaptive"] = "adaptive"
    target: Positive | None = None  # KL(π_old‖π) before a rollout's last update, nats a token; default ε²/8
    gain: Positive = 0.02
    bounds: tuple[Positive, Positive] = (0.1, 0.5)


class LambdaController(Section):
    kind: Literal["fixed", "adaptive"] = "adaptive"
    value: Fraction = 0.05  # where it starts, or stays when fixed
    target: Fraction = 0.9  # τ, the uncertainty that λ is driven to
    gain: Positive = 0.02
    bounds: tuple[Fraction, Fraction] = (0.05, 0.9)

    @model_validator(mode="after")
    def _starts_inside(self) -> Self:
        low, high = self.bounds
        if self.kind == "adaptive" and not low <= self.value <= high:
            raise ValueError(f"value: {self.value} is outside bounds [{low}, {high}]; widen them, or set kind to fixed")
        return self


class EntropyController(Section):
    kind: Literal["fixed", "adaptive"] = "fixed"
    target: Positive = 0.3  # entropy, nats a token
    gain: Positive = 0.02
    bounds: tuple[Positive, Positive] = (1e-5, 0.1)


class ControllersConfig(Section):
    beta: BetaController = BetaController()
    epsilon: EpsilonController = EpsilonController()
    lambda_: LambdaController = Field(LambdaController(), alias="lambda")
    entropy: EntropyController = EntropyController()

    @model_validator(mode="after")
    def _stable(self) -> Self:
        if self.beta.kind == "adaptive":
            check_beta_gain(self.beta.gain, self.beta.decay)
        for name in ("beta", "epsilon", "lambda", "entropy"):
            low, high = getattr(self, name.replace("lambda", "lambda_")).bounds
            if low > high:
                raise ValueError(f"{name}.bounds: {low} > {high}; write the lower bound first")
        return self

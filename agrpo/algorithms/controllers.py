"""Coefficients that move with what training shows: β with the divergence, ε with the update, λ with the uncertainty,
η with the entropy.

Every controller has `value`, `observe(x)`, `state_dict()` and `load_state_dict(state)`, so an ablation only swaps the
object. Each saturates at its bounds and winds up nothing behind them. An observation that is NaN or infinite (a step
without pairs, an overflow) holds the value and is counted in the state.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

State = Mapping[str, float]


def _clip(x: float, low: float, high: float) -> float:
    return min(high, max(low, x))


def check_beta_gain(gain: float, decay: float) -> None:
    """Refuse a β controller that would ring.

    Near the target the loop is an integrator of gain k behind an average of 1/(1 − decay) steps, which is damped only
    for k ≤ (1 − decay)/4.

    Raises:
        ValueError: gain above that limit or not positive, or decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    limit = (1 - decay) / 4
    if not 0 < gain <= limit * (1 + 1e-9):
        raise ValueError(
            f"a β gain of {gain} with decay {decay} is unstable: β would oscillate; the gain must be positive and at "
            f"most (1 − decay)/4 = {limit:.4g}"
        )


@dataclass
class Fixed:
    """A coefficient that does not move, whatever it observes."""

    value: float

    def observe(self, x: float) -> None:
        pass

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: State) -> None:
        self.value = state["value"]


@dataclass
class _Adaptive:
    target: float
    gain: float
    value: float
    bounds: tuple[float, float]
    ignored: int = 0  # observations that were NaN or infinite

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not low <= self.value <= high:
            raise ValueError(f"the initial value {self.value} is outside its bounds [{low}, {high}]")

    def observe(self, x: float) -> None:
        if not math.isfinite(x):
            self.ignored += 1
            return
        self.value = _clip(self._moved(x), *self.bounds)

    def _moved(self, x: float) -> float:
        raise NotImplementedError

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "ignored": self.ignored}

    def load_state_dict(self, state: State) -> None:
        self.value = _clip(state["value"], *self.bounds)  # the bounds may have been narrowed since it was saved
        self.ignored = int(state["ignored"])


@dataclass
class AdaptiveBeta(_Adaptive):
    """β_t holds the divergence from the reference near D* = `target` (nats per token).

    log β += k·clip(m/D* − 1, −1, 1), m the bias-corrected average of what was observed. The divergence starts at 0, so
    β is held until m first reaches D*/2: it would else run to its floor before training has begun. A sudden jump moves
    β by at most a factor e^k a step.

    Source: adaptive β_t on the symmetric KL is the A-GRPO paper's; averaging, the hold and the bounds are ours.
    """

    gain: float = 0.02
    value: float = 0.04
    bounds: tuple[float, float] = (1e-4, 1.0)
    decay: float = 0.9
    average: float = 0.0  # not bias-corrected
    observations: int = 0
    released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_beta_gain(self.gain, self.decay)
        if not self.target > 0:
            raise ValueError(f"the target divergence must be positive, got {self.target}")

    def _moved(self, x: float) -> float:
        self.observations += 1
        self.average = self.decay * self.average + (1 - self.decay) * x
        mean = self.average / (1 - self.decay**self.observations)
        self.released = self.released or mean >= self.target / 2
        if not self.released:
            return self.value
        return self.value * math.exp(self.gain * _clip(mean / self.target - 1, -1.0, 1.0))

    def state_dict(self) -> dict[str, float]:
        moving = {"average": self.average, "observations": self.observations, "released": self.released}
        return super().state_dict() | moving

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.average = state["average"]
        self.observations = int(state["observations"])
        self.released = bool(state["released"])


@dataclass
class AdaptiveEpsilon(_Adaptive):
    """ε_t widens the clip range while an update moves the policy less than κ = `target`, and narrows it above.

    log ε −= k·clip(u/κ − 1, −1, 1), u = KL(π_old‖π_θ) in nats per token, measured after the update. A clip range of ε₀
    lets about ε₀²/8 through, hence the default target. With one update a rollout ρ = 1 and the clip is inert: use
    `Fixed` there, since u says nothing about ε.

    Source: adaptive ε_t is the A-GRPO paper's and the KL-driven range the thesis's; the bounds are the ablation's ends.
    """

    target: float = 0.005  # 0.2²/8
    gain: float = 0.02
    value: float = 0.2
    bounds: tuple[float, float] = (0.1, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target > 0:
            raise ValueError(f"the target update divergence must be positive, got {self.target}")

    def _moved(self, x: float) -> float:
        return self.value * math.exp(-self.gain * _clip(x / self.target - 1, -1.0, 1.0))


@dataclass
class AdaptiveLambda(_Adaptive):
    """λ_t gives the preference loss more of the objective while its uncertainty is above τ = `target`.

    λ += η·(U − τ): dual ascent on the constraint U ≤ τ, U = mean h(σ(s_i − s_j))/ln 2 in [0, 1]. τ must exceed the
    labels' own entropy (`preference.label_entropy`), or U never comes down to it and λ stays at its upper bound.

    Source: the thesis; the bounds are ours, and are its anti-windup.
    """

    gain: float = 0.05
    value: float = 0.5
    bounds: tuple[float, float] = (0.05, 0.9)

    def _moved(self, x: float) -> float:
        return self.value + self.gain * (x - self.target)


@dataclass
class AdaptiveEntropy(_Adaptive):
    """η_t, the weight of the entropy bonus, rises while the policy's entropy is below H* = `target`, and falls above.

    log η −= k·clip(H/H* − 1, −1, 1), H in nats per token. It saturates at both bounds.

    Source: the multiplicative form of soft actor-critic's temperature (Haarnoja et al. 2018, arXiv 1812.05905), ours.
    """

    target: float = 0.3
    gain: float = 0.02
    value: float = 0.001
    bounds: tuple[float, float] = (1e-5, 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target > 0:
            raise ValueError(f"the target entropy must be positive, got {self.target}")

    def _moved(self, x: float) -> float:
        return self.value * math.exp(-self.gain * _clip(x / self.target - 1, -1.0, 1.0))

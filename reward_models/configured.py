"""From the `rewards:` section of a configuration to a RewardSet, and the check that it still scores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from agrpo.config import RewardSpec
from agrpo.engine import distributed
from reward_models.compose import Entry, Gate, RewardSet
from reward_models.loader import load_reward


class RewardsFailed(RuntimeError):
    """No reward scored any completion of a step: there is nothing to learn from."""


def reward_set(specs: Sequence[RewardSpec]) -> RewardSet:
    """Import or load every reward of the section.

    Raises:
        RewardError: a target that cannot be imported or made.
    """
    return RewardSet(
        [
            Entry(
                spec.label,
                load_reward(spec.target, spec.parameters),
                spec.weight,
                spec.normalise,
                spec.gate and Gate(**spec.gate.model_dump()),
            )
            for spec in specs
        ]
    )


def require_scores(rewards: RewardSet, scores: Tensor) -> None:
    """Stop the run, on every rank at once, when all (N, K) scores of all ranks are missing.

    Raises:
        RewardsFailed: with the first reason of each reward.
    """
    scored = distributed.sum_over_ranks({"scored": scores.isfinite().sum()})["scored"]
    if not scored:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in rewards.first_error.items())
        raise RewardsFailed(f"no reward scored any completion of this step.\n{reasons or 'All of them abstained.'}")

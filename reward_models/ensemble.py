"""An ensemble of learned rewards, and what its disagreement costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from agrpo.types import Text
from reward_models.learned import LearnedReward


class EnsembleReward:
    """μ − κ·σ over several reward models, or over the heads of one.

    Models trained apart do not share a scale, so with several each is first brought to mean 0 and deviation 1 over the
    completions of the call; a difference that all of them see survives that, one model's units do not.

    Args:
        models: folders or Hub ids; one with several labels counts as that many members.
        kappa: κ ≥ 0, how much disagreement (the population deviation σ over the members) takes from the mean.
        batch_tokens, trust_remote_code: as of the learned reward.

    `metrics["uncertainty"]` is the mean σ of the last call.

    Source: reward less κ·σ is the thesis's outlook; the normalisation is ours.
    """

    __name__ = "ensemble"

    def __init__(
        self, models: Sequence[str], kappa: float = 1.0, batch_tokens: int = 16384, trust_remote_code: bool = False
    ) -> None:
        if kappa < 0:
            raise ValueError(f"kappa: {kappa}; disagreement cannot be worth something: 0 or more")
        self.members = [LearnedReward(model, batch_tokens, trust_remote_code) for model in models]
        count = sum(member.heads for member in self.members)
        if count < 2:
            raise ValueError(f"models: {list(models)} have {count} head in all; an ensemble has two at least")
        self.kappa = kappa
        self.metrics = {"uncertainty": 0.0}

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        mean, deviation = self.judge(prompts, completions)
        self.metrics["uncertainty"] = float(deviation.mean())
        return (mean - self.kappa * deviation).tolist()

    def judge(self, prompts: list[Text], completions: list[Text]) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,) mean and (N,) deviation of the members' scores."""
        tables = [member.scores(prompts, completions) for member in self.members]  # each (N, heads)
        if len(tables) > 1:
            tables = [
                (table - table.mean(0)) / table.std(0, correction=0).clamp(min=1e-6) if len(table) > 1 else table
                for table in tables
            ]
        votes = torch.cat(tables, 1)
        return votes.mean(1), votes.std(1, correction=0)


build = EnsembleReward

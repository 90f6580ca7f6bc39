"""Rewards on rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from agrpo.types import Rollout, Text

_GIVEN = ("prompts", "completions", "completion_ids")  # what every reward gets; a column of that name stays out


class Scores(Protocol):
    """A set of rewards with weights (reward_models.compose.RewardSet)."""

    names: Sequence[str]
    weights: Tensor  # (K,)

    def score(self, prompts: Any, completions: Any, completion_ids: Any, columns: Any) -> Tensor: ...
    def total(self, scores: Tensor) -> Tensor: ...


def score(rewards: Scores, rollout: Rollout) -> Tensor:
    """(N, K) scores of the rollout's completions; NaN where a reward abstained or failed."""
    of = [rollout.prompts[p] for p in rollout.group.tolist()]
    texts: list[Text] = [
        text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(of, rollout.texts, strict=True)
    ]
    names = dict.fromkeys(name for prompt in rollout.prompts for name in prompt.columns if name not in _GIVEN)
    columns = {name: [prompt.columns.get(name) for prompt in of] for name in names}
    columns["finished"] = rollout.finished.tolist()
    ids = [t.tolist() for t in rollout.tokens.split(rollout.lengths.tolist())]
    return rewards.score([prompt.text for prompt in of], texts, ids, columns)


def ranked_groups(rollout: Rollout, rewards: Tensor) -> list[dict[str, Any]]:
    """Rows of preference data: each prompt's distinct completions, their level the rank of their reward.

    Completions without a reward are left out, and so are prompts whose completions all have the same one.
    """
    groups = []
    for p, prompt in enumerate(rollout.prompts):
        of_prompt = (rollout.group == p).nonzero()[:, 0].tolist()
        scored = {rollout.texts[n]: float(rewards[n]) for n in of_prompt if rollout.texts[n] and rewards[n].isfinite()}
        ranks = {value: rank for rank, value in enumerate(sorted(set(scored.values())))}
        if len(ranks) > 1:
            levels = [ranks[value] for value in scored.values()]
            groups.append(
                {
                    "slot": prompt.slot,
                    "prompt": prompt.text,
                    "completions": list(scored),
                    "levels": levels,
                    "rewards": list(scored.values()),
                }
            )
    return groups

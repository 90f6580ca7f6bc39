"""Rewards on rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from agrpo import job
from agrpo.engine import distributed
from agrpo.types import Rollout, Text

_GIVEN = ("prompts", "completions", "completion_ids")  # what every reward gets; a column of that name stays out


class Scores(Protocol):
    """A set of rewards with weights (reward_models.compose.RewardSet)."""

    names: Sequence[str]
    weights: Tensor  # (K,)

    def score(self, prompts: Any, completions: Any, completion_ids: Any, columns: Any) -> Tensor: ...
    def shaped(self, scores: Tensor) -> Tensor: ...
    def observe(self, scores: Tensor) -> None: ...
    def metrics(self) -> dict[str, float]: ...
    def take_errors(self) -> dict[str, int]: ...
    def total(self, scores: Tensor) -> Tensor: ...


def score(rewards: Scores, rollout: Rollout) -> Tensor:
    """(N, K) scores of the rollout's completions; NaN where a reward abstained or failed.

    With an environment a conversation is given with all its turns, and what its environment gave as the column
    `environment`. Where the environment failed nothing is scored.
    """
    job.enter("score")
    of = [rollout.prompts[p] for p in rollout.group.tolist()]
    turns = rollout.turns or [[{"role": "assistant", "content": text}] for text in rollout.texts]
    texts: list[Text] = [
        text if isinstance(prompt.text, str) else list(said)
        for prompt, text, said in zip(of, rollout.texts, turns, strict=True)
    ]
    names = dict.fromkeys(name for prompt in rollout.prompts for name in prompt.columns if name not in _GIVEN)
    columns = {name: [prompt.columns.get(name) for prompt in of] for name in names}
    columns["finished"] = rollout.finished.tolist()
    ids = [t.tolist() for t in rollout.tokens.split(rollout.lengths.tolist())]
    if len(rollout.outcomes):
        columns["environment"] = [None if value != value else value for value in rollout.outcomes.tolist()]
    scores = rewards.score([prompt.text for prompt in of], texts, ids, columns)
    return scores.masked_fill(rollout.outcomes.isnan()[:, None], math.nan) if len(rollout.outcomes) else scores


def observe_scores(rewards: Scores, scores: Tensor) -> None:
    """Take this step's (N, K) scores of all ranks into the rewards' running statistics."""
    rewards.observe(torch.cat(distributed.gather_objects(scores)))


def ranked_groups(rollout: Rollout, rewards: Tensor, votes: Tensor | None = None) -> list[dict[str, Any]]:
    """Rows of preference data: each prompt's distinct completions, their level the rank of their reward.

    Completions without a reward are left out, and so are prompts whose completions all have the same one.

    Args:
        rewards: (N,).
        votes: (N, K) scores of rewards that are an ensemble: a row then says each completion's mean and deviation,
            from which stage 2 knows how sure a pair is.
    """
    groups = []
    for p, prompt in enumerate(rollout.prompts):
        of_prompt = (rollout.group == p).nonzero()[:, 0].tolist()
        scored = {rollout.texts[n]: float(rewards[n]) for n in of_prompt if rollout.texts[n] and rewards[n].isfinite()}
        ranks = {value: rank for rank, value in enumerate(sorted(set(scored.values())))}
        if len(ranks) > 1:
            levels = [ranks[value] for value in scored.values()]
            place = {rollout.texts[n]: n for n in of_prompt}
            judged = [] if votes is None else [votes[place[text]] for text in scored]
            groups.append(
                {
                    "slot": prompt.slot,
                    "prompt": prompt.text,
                    "completions": list(scored),
                    "levels": levels,
                    "rewards": list(scored.values()),
                    **({"means": [float(v.mean()) for v in judged]} if judged else {}),
                    **({"deviations": [float(v.std(correction=0)) for v in judged]} if judged else {}),
                }
            )
    return groups

"""Rewards on rollouts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from agrpo import job
from agrpo.engine import distributed
from agrpo.types import Ended, Prompt, Rollout, Text

_GIVEN = ("prompts", "completions", "completion_ids")  # what every reward gets; a column of that name stays out


class Early(Protocol):
    """What some rewards have scored of a rollout before it was complete (reward_models.early.Early)."""

    ended: Ended

    def stop(self) -> float: ...
    def close(self) -> None: ...


class Scores(Protocol):
    """A set of rewards with weights (reward_models.compose.RewardSet)."""

    names: Sequence[str]
    weights: Tensor  # (K,)

    def begin(self, prompts: Any, columns: Any) -> Early | None: ...
    def score(self, prompts: Any, completions: Any, completion_ids: Any, columns: Any, early: Any = None) -> Tensor: ...
    def shaped(self, scores: Tensor) -> Tensor: ...
    def observe(self, scores: Tensor) -> None: ...
    def metrics(self) -> dict[str, float]: ...
    def take_errors(self) -> dict[str, int]: ...
    def total(self, scores: Tensor) -> Tensor: ...


@contextmanager
def scored_early(rewards: Scores, prompts: Sequence[Prompt], counts: Sequence[int]) -> Iterator[Early | None]:
    """For sampling and `score`: completions that end are scored meanwhile, by rewards that wait outside this process.

    None where no reward does. What still runs when this is left by an exception is not waited for.
    """
    of = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    early = rewards.begin([prompt.text for prompt in of], _columns(prompts, of))
    try:
        yield early
    finally:
        if early is not None:
            early.close()


def score(rewards: Scores, rollout: Rollout, early: Early | None = None) -> Tensor:
    """(N, K) scores of the rollout's completions; NaN where a reward abstained or failed.

    With an environment a conversation is given with all its turns, and what its environment gave as the column
    `environment`. Where the environment failed nothing is scored.

    Args:
        early: of `scored_early`, if it was there while the rollout was sampled; it changes no score.
    """
    job.enter("score")
    of = [rollout.prompts[p] for p in rollout.group.tolist()]
    turns = rollout.turns or [[{"role": "assistant", "content": text}] for text in rollout.texts]
    texts: list[Text] = [
        text if isinstance(prompt.text, str) else list(said)
        for prompt, text, said in zip(of, rollout.texts, turns, strict=True)
    ]
    columns = _columns(rollout.prompts, of)
    columns["finished"] = rollout.finished.tolist()
    ids = [t.tolist() for t in rollout.tokens.split(rollout.lengths.tolist())]
    if len(rollout.outcomes):
        columns["environment"] = [None if value != value else value for value in rollout.outcomes.tolist()]
    scores = rewards.score([prompt.text for prompt in of], texts, ids, columns, early)
    return scores.masked_fill(rollout.outcomes.isnan()[:, None], math.nan) if len(rollout.outcomes) else scores


def _columns(prompts: Sequence[Prompt], of: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Every column that one of the prompts has, with a value for each completion, whose prompts are `of`."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns if name not in _GIVEN)
    return {name: [prompt.columns.get(name) for prompt in of] for name in names}


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

"""From a rollout to what an update learns from: scores, rewards, advantages, pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from agrpo.algorithms.advantages import ESTIMATORS
from agrpo.algorithms.pruning import keep_largest
from agrpo.config import AdvantageConfig
from agrpo.engine import distributed
from agrpo.types import Experience, Rollout, Text

_GIVEN = ("prompts", "completions", "completion_ids")  # what every reward gets; a column of that name stays out


class Scores(Protocol):
    """A set of rewards with weights (reward_models.compose.RewardSet)."""

    names: Sequence[str]

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


def estimate_advantages(rewards: Tensor, rollout: Rollout, config: AdvantageConfig) -> Tensor:
    """(N,) advantages of this rank's completions, with statistics over the batch of all ranks.

    Every rank computes the same estimate of the whole batch, ordered by prompt slot, and keeps its own part: the result
    does not depend on the number of ranks.
    """
    slots = torch.tensor([prompt.slot for prompt in rollout.prompts])[rollout.group]  # (N,)
    parts = distributed.gather_objects((rewards, slots))
    everything = torch.cat([r for r, _ in parts])
    order = torch.cat([s for _, s in parts]).argsort(stable=True)
    group = torch.cat([s for _, s in parts])[order].unique(return_inverse=True)[1]
    ordered = ESTIMATORS[config.kind](
        everything[order], group, delta=config.delta, std_ddof=config.std_ddof, kappa=config.kappa
    )
    advantages = torch.empty_like(ordered)
    advantages[order] = ordered
    before = sum(len(r) for r, _ in parts[: distributed.rank()])
    return advantages[before : before + len(rewards)]


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


def prune(experience: Experience, rate: float) -> Experience:
    """CPPO: only the completions of largest |A| go on to the update."""
    if rate == 0:
        return experience
    rollout = experience.rollout
    keep = keep_largest(experience.advantages, rollout.group, rate)
    tokens = keep.repeat_interleave(rollout.lengths)
    kept = Rollout(
        prompts=rollout.prompts,
        group=rollout.group[keep],
        lengths=rollout.lengths[keep],
        tokens=rollout.tokens[tokens],
        logp=rollout.logp[tokens],
        finished=rollout.finished[keep],
        texts=tuple(text for text, kept in zip(rollout.texts, keep.tolist(), strict=True) if kept),
        weight_version=rollout.weight_version,
    )
    return Experience(rollout=kept, rewards=experience.rewards[keep], advantages=experience.advantages[keep])

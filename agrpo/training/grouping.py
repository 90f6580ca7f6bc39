"""Which prompts are sampled how often in a step: fixed groups, adaptive ones, or rounds until enough groups differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from agrpo.algorithms.advantages import spread
from agrpo.algorithms.grouping import neyman_allocation, pass_deviation
from agrpo.config import PolicyConfig
from agrpo.engine import distributed
from agrpo.engine.backends.native import Sampling
from agrpo.engine.hybrid import HybridEngine
from agrpo.training.ahead import Pending, StepAhead, prompts_at
from agrpo.training.rollouts import join, take, without_silent_prompts
from agrpo.training.scoring import Early, Scores, score, scored_early
from agrpo.types import Prompt, Rollout

Sample = Callable[[Sequence[Prompt], Sequence[int], int], tuple[Rollout, Tensor]]  # completions and (N, K) scores
Sampled = tuple[Rollout, Tensor, dict[str, float]]  # and metrics


class Sampler:
    """Samples a step's completions as `grouping` says, and scores them.

    Args:
        config: of stage 3.
        prompts: all prompts of the data; each call takes some of them from the stream.
        stream: batches of (slot, index) of this rank.
        rewards: score completions.
    """

    def __init__(
        self,
        config: PolicyConfig,
        prompts: Sequence[Prompt],
        stream: Iterator[Sequence[tuple[int, int]]],
        rewards: Scores,
    ) -> None:
        self.config, self.prompts, self.stream, self.rewards = config, prompts, stream, rewards
        sampling = config.sampling
        self._how = Sampling.of(sampling)
        self._ahead = StepAhead(config.training.max_steps) if config.rollout.ahead else None
        kinds = {"fixed": self._fixed, "adaptive": self._adaptive, "dynamic": self._dynamic}
        self._collect = kinds[config.grouping.kind]

    def __call__(self, engine: HybridEngine, step: int) -> Sampled:
        self._seconds = Counter({"time/generate_s": 0.0, "time/reward_s": 0.0})

        def sample(prompts: Sequence[Prompt], counts: Sequence[int], first: int) -> tuple[Rollout, Tensor]:
            with scored_early(self.rewards, prompts, counts) as early:
                began = perf_counter()
                told = {} if early is None else {"ended": early.ended}
                rollout = engine.generate(prompts, counts, self._how, (self.config.seed, step), first, **told)
                self._seconds["time/generate_s"] += perf_counter() - began
                return rollout, self._score(rollout, early)

        if self._ahead is not None:
            return self._one_ahead(engine, step)
        rollout, scores, metrics = self._collect(sample)
        return rollout, scores, {**metrics, **self._seconds}

    def state_dict(self) -> dict[str, Any]:
        """The rollout that waits for its step, if any. Every rank must call it."""
        return {} if self._ahead is None else self._ahead.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._ahead is not None:
            self._ahead.load_state_dict(state, self.prompts)

    def _score(self, rollout: Rollout, early: Early | None = None) -> Tensor:
        if not len(rollout.lengths):
            return torch.zeros(0, len(self.rewards.names))
        began = perf_counter()
        if early is not None:
            self._seconds["time/reward_overlap_s"] += early.stop()
        scores = score(self.rewards, rollout, early)
        self._seconds["time/reward_s"] += perf_counter() - began
        return scores

    def _ask(self, round_: int = 0) -> list[Prompt]:
        """The stream's next prompts. Slots of later rounds go on counting: they key the random streams."""
        offset = round_ * self.config.prompts_per_rollout
        return prompts_at(self.prompts, [(offset + slot, i) for slot, i in next(self.stream)])

    def _fixed(self, sample: Sample) -> Sampled:
        asked = self._ask()
        rollout, scores = sample(asked, [self.config.sampling.num_generations] * len(asked), 0)
        return rollout, scores, {}

    def _one_ahead(self, engine: HybridEngine, step: int) -> Sampled:
        """`_fixed`, sampled while the step before updated: by the weights that that step began with."""
        size = self.config.sampling.num_generations

        def begin(at: int) -> Pending:
            pairs = next(self.stream)
            asked = prompts_at(self.prompts, pairs)
            key = (self.config.seed, at)
            return Pending(pairs, engine.begin_generating(asked, [size] * len(asked), self._how, key))

        began = perf_counter()
        rollout = self._ahead.take(step, begin)
        self._seconds["time/generate_s"] = perf_counter() - began
        behind = engine.weight_version - rollout.weight_version
        if not 0 <= behind <= self.config.objective.updates_per_rollout:
            raise RuntimeError(
                f"step {step}: its completions are of weight version {rollout.weight_version}, the policy is at"
                f" {engine.weight_version}: more than one step of {self.config.objective.updates_per_rollout} updates"
            )
        scores = self._score(rollout)
        return rollout, scores, {"agrpo/staleness": float(behind), **self._seconds}

    def _adaptive(self, sample: Sample) -> Sampled:
        """A pilot for every prompt, then the rest of the budget where the rewards are least certain."""
        grouping, size = self.config.grouping, self.config.sampling.num_generations
        asked = self._ask()
        pilot, scores = sample(asked, [grouping.least] * len(asked), 0)
        own = _outcomes(pilot, self.rewards.total(scores))
        parts = distributed.gather_objects((own, [p.slot for p in asked]))
        outcomes = [outcome for part, _ in parts for outcome in part]
        slots = [slot for _, part in parts for slot in part]
        order = sorted(range(len(slots)), key=slots.__getitem__)
        budget = size * len(slots)
        counts = neyman_allocation(deviations([outcomes[i] for i in order]), budget, grouping.least, grouping.most)
        of_slot = {slots[i]: count for i, count in zip(order, counts, strict=True)}
        more = [of_slot[p.slot] - grouping.least for p in asked]
        metrics = {"agrpo/group_size_min": float(min(counts)), "agrpo/group_size_max": float(max(counts))}
        if not any(more):
            sample(asked, more, grouping.least)  # nothing; other ranks may need this one's shards
            return pilot, scores, metrics
        chosen = [p for p, count in zip(asked, more, strict=True) if count]
        rest, its = sample(chosen, [count for count in more if count], grouping.least)
        rollout, places = join([pilot, rest])
        return rollout, torch.cat([scores, its])[places], metrics

    def _dynamic(self, sample: Sample) -> Sampled:
        """DAPO: rounds of sampling until enough groups have rewards that differ; the others are thrown away.

        After the last round what is missing is filled up with groups that do not, so a step is never empty.
        """
        wanted, size = self.config.sampling.prompts_per_step, self.config.sampling.num_generations
        rollouts: list[Rollout] = []
        scores: list[Tensor] = []
        mixed: list[int] = []  # slots, over all ranks
        rounds = 0
        while len(mixed) < wanted and rounds < self.config.grouping.max_rounds:
            asked = self._ask(rounds)
            rollout, its = sample(asked, [size] * len(asked), 0)
            rollouts.append(rollout)
            scores.append(its)
            differ = spread(self.rewards.total(scores[-1]), rollouts[-1].group).tolist()
            own = [p.slot for p, differs in zip(asked, differ, strict=True) if differs]
            mixed += sorted(slot for part in distributed.gather_objects(own) for slot in part)
            rounds += 1
        rollout, order = join(rollouts)
        rollout, table = _of_all_ranks(rollout, torch.cat(scores)[order])
        sampled = [p.slot for p in rollout.prompts]
        silent = sorted(set(sampled) - set(mixed))
        kept = mixed[:wanted] + silent[: max(0, wanted - len(mixed))]
        mine = sorted(kept)[distributed.rank() :: distributed.world()]
        index = {slot: p for p, slot in enumerate(sampled)}
        members = torch.isin(rollout.group, torch.tensor([index[slot] for slot in mine])).nonzero()[:, 0]
        metrics = {
            "agrpo/sampling_rounds": float(rounds),
            "agrpo/groups_discarded": float(len(sampled) - len(kept)),
            "agrpo/groups_mixed": len(mixed) / len(sampled),
        }
        return without_silent_prompts(take(rollout, members)), table[members], metrics


def _outcomes(rollout: Rollout, rewards: Tensor) -> list[list[float]]:
    """The finite rewards of each prompt's completions."""
    return [
        [r for r in rewards[rollout.group == p].tolist() if r == r]  # NaN: not scored
        for p in range(len(rollout.prompts))
    ]


def deviations(outcomes: Sequence[Sequence[float]]) -> list[float]:
    """How uncertain each prompt's reward is, from the pilot's.

    Where all rewards of the batch take two values, the posterior deviation of the pass rate. Else the deviation over
    the pilot, shrunk towards the batch's as if that were one more sample, so that agreeing pilots stay open.
    """
    values = {reward for group in outcomes for reward in group}
    if len(values) <= 2:
        best = max(values, default=1.0)
        return [pass_deviation(sum(reward == best for reward in group), len(group)) for group in outcomes]
    squares = [sum((reward - sum(group) / len(group)) ** 2 for reward in group) for group in outcomes]
    prior = sum(squares) / sum(map(len, outcomes))
    return [math.sqrt((own + prior) / (len(group) + 1)) for own, group in zip(squares, outcomes, strict=True)]


def _of_all_ranks(rollout: Rollout, scores: Tensor) -> tuple[Rollout, Tensor]:
    """Every rank's completions, so that those that stay can be dealt out evenly."""
    parts = distributed.gather_objects((rollout, scores))
    everything, order = join([part for part, _ in parts])
    return everything, torch.cat([part for _, part in parts])[order]

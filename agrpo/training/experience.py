"""From a scored rollout to what an update learns from: advantages, of completions or tokens, and pruning."""

from __future__ import annotations

import torch
from torch import Tensor

from agrpo.algorithms.advantages import ESTIMATORS, gdpo_advantages
from agrpo.algorithms.gae import discounted_sum, generalised_advantages, token_rewards
from agrpo.algorithms.pruning import keep_largest, keep_largest_overall
from agrpo.algorithms.segments import per_token
from agrpo.config import AdvantageConfig, PolicyConfig, PruningConfig
from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.training.batches import Sequences, in_step, micro_batches
from agrpo.training.rollouts import take, without_silent_prompts
from agrpo.training.scoring import Scores
from agrpo.types import Experience, Rollout


def make_experience(
    engine: HybridEngine, rollout: Rollout, scores: Tensor, rewards: Scores, config: PolicyConfig, beta: float
) -> Experience:
    """Everything that an update needs of a rollout.

    Args:
        scores: (N, K) of the reward functions.
        beta: weight of the divergence, for a penalty kept in the reward.
    """
    total = rewards.total(scores)  # (N,)
    if config.advantage.of_tokens:
        return _credit_tokens(engine, rollout, scores, total, config, beta)
    advantages = estimate_advantages(rewards.shaped(scores), rewards.weights, total, rollout, config.advantage)
    nothing = total.new_zeros(0)
    of_tokens = per_token(advantages, rollout.lengths)
    return Experience(rollout, scores, total, of_tokens, reference=nothing, values=nothing, returns=nothing)


def estimate_advantages(
    scores: Tensor, weights: Tensor, rewards: Tensor, rollout: Rollout, config: AdvantageConfig
) -> Tensor:
    """(N,) advantages of this rank's completions, with statistics over the batch of all ranks.

    Every rank computes the same estimate of the whole batch, ordered by prompt slot, and keeps its own part: the result
    does not depend on the number of ranks.
    """
    slots = torch.tensor([prompt.slot for prompt in rollout.prompts], dtype=torch.long)[rollout.group]  # (N,)
    parts = distributed.gather_objects((scores, rewards, slots))
    scores, everything, slots = (torch.cat(column) for column in zip(*parts, strict=True))
    order = slots.argsort(stable=True)
    group = slots[order].unique(return_inverse=True)[1]
    how = {"delta": config.delta, "std_ddof": config.std_ddof}
    if config.kind == "gdpo":
        ordered = gdpo_advantages(scores[order], weights, group, **how)
    else:
        ordered = ESTIMATORS[config.kind](everything[order], group, kappa=config.kappa, **how)
    advantages = torch.empty_like(ordered)
    advantages[order] = ordered
    before = sum(len(own) for _, own, _ in parts[: distributed.rank()])
    return advantages[before : before + len(rewards)]


def _credit_tokens(
    engine: HybridEngine, rollout: Rollout, scores: Tensor, rewards: Tensor, config: PolicyConfig, beta: float
) -> Experience:
    """Advantages of single tokens, normalised over all tokens of all ranks: PPO's, and REINFORCE++'s.

    One forward of the policy that sampled and one of the reference come before the update. A completion without any
    score is left out of mean and deviation; its advantages are 0, and the critic is asked for what it says already.
    """
    sequences = Sequences.of_rollout(rollout)
    temperature, advantage = config.sampling.temperature, config.advantage
    logp, reference, values = (torch.zeros(len(rollout.tokens)) for _ in range(3))
    parts = micro_batches(sequences.costs, config.training.micro_batch_tokens)
    for i, _, _ in in_step(parts):
        layout = sequences.layout(parts[i])
        places = sequences.token_places(sequences.members(parts[i]))
        logp[places], _, *critic = (part.cpu() for part in engine.evaluate(layout, temperature))
        reference[places] = logp[places]
        if engine.has_reference:
            reference[places] = engine.reference_logprobs(layout, temperature).cpu()
        if critic:
            values[places] = critic[0]
    penalty = beta * (logp - reference) if config.objective.kl_in == "reward" else torch.zeros_like(logp)
    due = token_rewards(rewards, penalty, rollout.lengths)
    if advantage.kind == "gae":
        raw = generalised_advantages(due, values, rollout.lengths, advantage.gamma, advantage.gae_lambda)
        returns = raw + values
    else:
        raw, returns, values = discounted_sum(due, rollout.lengths, advantage.gamma), due.new_zeros(0), due.new_zeros(0)
    scored = per_token(~rewards.isnan(), rollout.lengths)
    returns = torch.where(scored, returns, values) if len(returns) else returns
    raw = raw.double()
    own = raw[scored]
    sums = distributed.sum_over_ranks({"sum": own.sum(), "square": own.square().sum(), "count": len(own)})
    count = max(1.0, sums["count"])
    mean = sums["sum"] / count
    deviation = max(0.0, sums["square"] / count - mean**2) ** 0.5
    normal = torch.where(scored, (raw - mean) / (deviation + advantage.delta), 0.0).float()
    if not engine.has_reference:
        reference = reference.new_zeros(0)
    return Experience(rollout, scores, rewards, normal, reference=reference, values=values, returns=returns)


def prune(experience: Experience, config: PruningConfig) -> Experience:
    """CPPO: only the completions of largest |A| go on to the update. With `scope: batch`, of all ranks together."""
    if config.rate == 0:
        return experience
    rollout = experience.rollout
    advantages = experience.advantages[rollout.lengths.cumsum(0) - 1]  # (N,), the same at all tokens of a completion
    if config.scope == "group":
        keep = keep_largest(advantages, rollout.group, config.rate)
    else:
        parts = distributed.gather_objects(advantages)
        before = sum(map(len, parts[: distributed.rank()]))
        keep = keep_largest_overall(torch.cat(parts), config.rate)[before : before + len(advantages)]
        if not keep.any():  # a rank needs something to lay out: its largest
            keep[advantages.abs().argmax()] = True
    which = keep.nonzero()[:, 0]
    return Experience(
        rollout=without_silent_prompts(take(rollout, which)),
        scores=experience.scores[which],
        rewards=experience.rewards[which],
        advantages=experience.advantages[keep.repeat_interleave(rollout.lengths)],
        reference=experience.reference,
        values=experience.values,
        returns=experience.returns,
    )

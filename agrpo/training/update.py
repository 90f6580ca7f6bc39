"""The policy update: optimiser steps on one rollout's experience."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from agrpo.algorithms.objective import PolicyTerms, policy_loss, token_weights
from agrpo.algorithms.preference import (
    Pairs,
    confidence_from_rewards,
    group_preference_loss,
    implicit_reward,
    ordered_pairs,
    pair_weights,
    preference_uncertainty,
    stratum_totals,
)
from agrpo.config import ObjectiveConfig, SamplingConfig, TrainingConfig
from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.training.batches import Sequences, in_step, micro_batches
from agrpo.types import Experience


@dataclass(frozen=True)
class Coefficients:
    """What the controllers hold during a step."""

    beta: float
    epsilon: float  # the lower end; the upper keeps its configured proportion to it
    lambda_: float
    reward_scale: float  # τ_R, in which reward differences become confidences


@dataclass(frozen=True)
class _Totals:
    """Denominators of the whole optimiser step, over all ranks."""

    tokens: int
    sequences: int
    pair_weight: float
    strata: dict[float, float]


def update_policy(
    engine: HybridEngine,
    experience: Experience,
    coefficients: Coefficients,
    objective: ObjectiveConfig,
    training: TrainingConfig,
    sampling: SamplingConfig,
    learning_rate: float,
) -> dict[str, float]:
    """`objective.updates_per_rollout` optimiser steps, each over the whole experience of all ranks.

    L = λ·L_group + (1 − λ)·L_policy. The policy that sampled is the one before the first update, so its
    log-probabilities are those of the first forward, detached: no extra pass. The reference is read once for all.

    Returns:
        Metrics of the step, means over all ranks: of the last update, except `loss` and `grad_norm`, of the first.
    """
    rollout = experience.rollout
    sequences = Sequences([p.ids for p in rollout.prompts], rollout.group, rollout.lengths, rollout.tokens)
    batches = micro_batches(sequences.costs, training.micro_batch_tokens)
    layouts = [sequences.layout(batch) for batch in batches]
    members = [sequences.members(batch) for batch in batches]
    pairs = [ordered_pairs(experience.rewards[m], rollout.group[m] - rollout.group[m].min()) for m in members]
    totals = _totals(experience, members, pairs, coefficients, objective)
    epsilon_high = coefficients.epsilon * objective.epsilon_high / objective.epsilon_low
    reference: list[Tensor | None] = [None] * len(batches)
    for b, _, _ in in_step(batches) if engine.has_reference else ():
        reference[b] = engine.reference_logprobs(layouts[b], sampling.temperature)
    old: list[Tensor | None] = [None] * len(batches)
    metrics: dict[str, float] = {}
    for update in range(objective.updates_per_rollout):
        sums: Counter[str] = Counter()
        for b, counts, last in in_step(batches):
            logp, entropy = engine.forward(layouts[b], sampling.temperature)
            if not counts:
                engine.backward(0.0 * (logp.sum() + entropy.sum()), last)
                continue
            old[b] = logp.detach() if old[b] is None else old[b]
            ref = logp.detach() if reference[b] is None else reference[b]
            m, lengths = members[b], layouts[b].lengths.to(logp.device)
            weights = token_weights(
                lengths,
                objective.aggregation,
                total_tokens=totals.tokens,
                total_sequences=totals.sequences,
                max_length=sampling.max_completion_length,
            )
            policy, terms = policy_loss(
                logp,
                old[b],
                ref,
                entropy,
                experience.advantages[m].to(logp.device),
                lengths,
                weights=weights,
                epsilon_low=coefficients.epsilon,
                epsilon_high=epsilon_high,
                beta=coefficients.beta,
                entropy_coef=objective.entropy_coef,
                kl=objective.kl if reference[b] is not None else "none",
                ratio=objective.ratio,
                dual_clip=objective.dual_clip,
            )
            loss = (1 - coefficients.lambda_) * policy
            if coefficients.lambda_ > 0 and totals.pair_weight > 0:
                preference, observed = _group_loss(
                    logp, ref, lengths, pairs[b], experience.rewards[m], totals, coefficients, objective
                )
                loss = loss + coefficients.lambda_ * preference
                sums.update(observed)
            engine.backward(loss, last)
            sums.update(loss=float(loss.detach()), **_numbers(terms))
        norm = engine.step(learning_rate)
        metrics |= _means(distributed.sum_over_ranks(_complete(sums)), norm, update, totals)
    return metrics


def _confidence(pairs: Pairs, rewards: Tensor, scale: float) -> Tensor:
    """(M,) how sure the rewards are of each pair."""
    return confidence_from_rewards(rewards[pairs.better], rewards[pairs.worse], scale)


def _totals(
    experience: Experience,
    members: list[Tensor],
    pairs: list[Pairs],
    coefficients: Coefficients,
    objective: ObjectiveConfig,
) -> _Totals:
    scheme = objective.group_loss.pair_weighting
    confidences = [
        _confidence(p, experience.rewards[m], coefficients.reward_scale) for p, m in zip(pairs, members, strict=True)
    ]
    strata: Counter[float] = Counter()
    if scheme == "hierarchical":
        for part in distributed.gather_objects([stratum_totals(p, c) for p, c in zip(pairs, confidences, strict=True)]):
            for totals in part:
                strata.update(totals)
    weight = sum(
        float(pair_weights(p, c, scheme, totals=strata).sum()) for p, c in zip(pairs, confidences, strict=True)
    )
    lengths = experience.rollout.lengths
    sums = distributed.sum_over_ranks({"tokens": int(lengths.sum()), "sequences": len(lengths), "weight": weight})
    return _Totals(int(sums["tokens"]), int(sums["sequences"]), sums["weight"], dict(strata))


def _group_loss(
    logp: Tensor,
    ref: Tensor,
    lengths: Tensor,
    pairs: Pairs,
    rewards: Tensor,
    totals: _Totals,
    coefficients: Coefficients,
    objective: ObjectiveConfig,
) -> tuple[Tensor, dict[str, float]]:
    """This micro-batch's share of L_group, and what the λ controller will observe."""
    config = objective.group_loss
    confidence = _confidence(pairs, rewards, coefficients.reward_scale)
    weights = pair_weights(pairs, confidence, config.pair_weighting, totals=totals.strata)
    scores = implicit_reward(logp, ref, lengths, alpha=config.alpha, reduction=config.implicit_reward)
    on_device = Pairs(*(value.to(scores.device) for value in (pairs.better, pairs.worse, pairs.gap)))
    loss = group_preference_loss(scores, on_device, weights.to(scores.device)) / totals.pair_weight
    uncertainty, count = preference_uncertainty(scores, on_device)
    return loss, {"group_loss": float(loss.detach()), "uncertainty": float(uncertainty), "pairs": count}


_GROUP_SUMS = ("group_loss", "uncertainty", "pairs")


def _numbers(terms: PolicyTerms) -> dict[str, float]:
    return {field.name: float(getattr(terms, field.name)) for field in fields(terms)}


def _complete(sums: Counter[str]) -> dict[str, float]:
    """Every key on every rank, in one order."""
    names = ("loss", *_GROUP_SUMS, *(field.name for field in fields(PolicyTerms)))
    return {name: float(sums[name]) for name in names}


def _means(sums: dict[str, float], norm: float, update: int, totals: _Totals) -> dict[str, float]:
    tokens = max(1.0, sums["tokens"])
    metrics = {
        "kl": sums["kl"] / tokens,
        "entropy": sums["entropy"] / tokens,
        "clip_ratio/low_mean": sums["clipped_low"] / tokens,
        "clip_ratio/high_mean": sums["clipped_high"] / tokens,
        "clip_ratio/region_mean": sums["clipped"] / tokens,
        "agrpo/policy_loss": sums["policy"],
        "agrpo/kl_symmetric": sums["symmetric_kl"] / tokens,
        "agrpo/kl_update": sums["update_kl"] / tokens,
    }
    if totals.pair_weight > 0 and sums["pairs"] > 0:
        metrics["agrpo/group_loss"] = sums["group_loss"]
        metrics["agrpo/uncertainty"] = sums["uncertainty"] / sums["pairs"]
    if update == 0:
        metrics |= {"loss": sums["loss"], "grad_norm": norm}
    return metrics


def mean_over_ranks(values: Tensor) -> float:
    """Mean of all finite values of all ranks; NaN where there are none."""
    finite = values[torch.isfinite(values)].double()
    sums = distributed.sum_over_ranks({"sum": finite.sum(), "count": len(finite)})
    return sums["sum"] / sums["count"] if sums["count"] else float("nan")

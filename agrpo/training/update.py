"""The policy update: optimiser steps on one rollout's experience."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from agrpo.algorithms.gae import value_loss
from agrpo.algorithms.objective import PolicyTerms, policy_loss, sampler_weights, token_weights
from agrpo.algorithms.preference import (
    Pairs,
    confidence_from_ensemble,
    confidence_from_rewards,
    group_preference_loss,
    implicit_reward,
    label_entropy,
    ordered_pairs,
    pair_weights,
    preference_uncertainty,
)
from agrpo.config import GroupLossConfig, PolicyConfig
from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.engine.layout import Layout
from agrpo.training.batches import Sequences, in_step, micro_batches
from agrpo.training.buffer import Buffer
from agrpo.training.preference import RankedBatch, flips, implicit_scores, strata_of_all_ranks, to_device
from agrpo.types import Experience

_UNCLIPPED = (1.0, math.inf)  # ratios are never negative: [1 − 1, 1 + ∞] holds none of them


@dataclass(frozen=True)
class Coefficients:
    """What the controllers hold during a step."""

    beta: float
    epsilon: float  # the lower end; the upper keeps its configured proportion to it
    lambda_: float
    entropy: float
    reward_scale: float  # τ_R, in which reward differences become confidences


@dataclass(frozen=True)
class MicroBatch:
    """What one forward of the update learns from; n completions with c tokens."""

    layout: Layout
    advantages: Tensor  # (c,)
    weights: Tensor  # (c,) of the tokens in the objective
    sampler: Tensor  # (c,) nats, as the sampler computed them
    reference: Tensor | None  # (c,) nats; None: nothing is measured against a reference
    values: Tensor  # (c,), as `returns` empty without a critic
    returns: Tensor
    pairs: Pairs
    pair_weights: Tensor  # (m,), over all ranks' total
    flipped: Tensor  # (m,)


def update_policy(
    engine: HybridEngine,
    experience: Experience,
    coefficients: Coefficients,
    config: PolicyConfig,
    learning_rate: float,
    ranked: RankedBatch | None = None,
    buffer: Buffer | None = None,
) -> dict[str, float]:
    """`objective.updates_per_rollout` optimiser steps, each over the whole experience of all ranks.

    L = λ·L_group + (1 − λ)·L_policy, and the critic's loss where there is one. The policy that sampled is the one
    before the first update, so its log-probabilities are those of the first forward, detached: no extra pass. Where
    another program sampled, they also correct L_policy for what its forward does differently. The reference is read
    once for all updates.

    Args:
        ranked: ranked data that has its share in L_group; None where the configuration has none.
        buffer: where the updates stand, for a run that stops between two of them and goes on there.

    Returns:
        Metrics of the step, means over all ranks: of the last update, except `loss` and `grad_norm`, of the first.
    """
    objective, temperature = config.objective, config.sampling.temperature
    batches, totals = _micro_batches(engine, experience, coefficients, config)
    epsilon = coefficients.epsilon, coefficients.epsilon * objective.epsilon_high / objective.epsilon_low
    epsilon_low, epsilon_high = epsilon if objective.clip else _UNCLIPPED
    from_data = 0.0 if ranked is None or ranked.totals["weight/0"] == 0 else objective.group_loss.ranked.ratio
    old: list[Tensor | None] = [None] * len(batches)
    weights = [batch.weights for batch in batches]
    buffer = buffer or Buffer()
    done, metrics, corrected = buffer.resume(old, weights, [len(batch.advantages) for batch in batches])
    for update in range(done, objective.updates_per_rollout):
        sums: Counter[str] = Counter()
        for b, counts, last in in_step(batches):
            batch = batches[b]
            logp, entropy, *critic = engine.forward(batch.layout, temperature)
            if not counts:
                engine.backward(0.0 * sum(part.sum() for part in (logp, entropy, *critic)), last and not from_data)
                continue
            lengths = batch.layout.lengths.to(logp.device)
            if old[b] is None:
                old[b] = logp.detach()
                if config.corrects_sampler:
                    m, held = sampler_weights(
                        old[b], batch.sampler, lengths, objective.sampler_correction, objective.sampler_cap
                    )
                    weights[b] = batch.weights * m
                    corrected.update(m=float(m.sum()), squares=float(m.square().sum()), held=float(held.sum()))
            reference = logp.detach() if batch.reference is None else batch.reference
            policy, terms = policy_loss(
                logp,
                old[b],
                reference,
                entropy,
                batch.advantages,
                lengths,
                weights=weights[b],
                epsilon_low=epsilon_low,
                epsilon_high=epsilon_high,
                beta=coefficients.beta if objective.kl_in == "loss" else 0.0,
                entropy_coef=coefficients.entropy,
                kl=objective.kl if batch.reference is not None else "none",
                ratio=objective.ratio,
                dual_clip=objective.dual_clip,
            )
            loss = (1 - coefficients.lambda_) * policy
            if critic:
                missed = value_loss(critic[0], batch.values, batch.returns, objective.value_clip)  # (c,)
                loss = loss + objective.value_coef * missed.sum() / totals.tokens
                sums.update(value_loss=float(missed.detach().sum()))
            if coefficients.lambda_ > 0 and totals.pair_weight > 0:
                preference, observed = _group_loss(logp, reference, lengths, batch, objective.group_loss)
                loss = loss + coefficients.lambda_ * (1 - from_data) * preference
                sums.update(observed)
            engine.backward(loss, last and not from_data)
            sums.update(loss=float(loss.detach()), **_numbers(terms))
        if from_data:
            sums.update(_learn_ranked(engine, ranked, coefficients.lambda_ * from_data))
        norm = engine.step(learning_rate)
        metrics |= _means(distributed.sum_over_ranks(_complete(sums)), norm, update, totals, ranked)
        if update + 1 < objective.updates_per_rollout:
            buffer.after_update(update + 1, old, weights, metrics, corrected)
    if config.corrects_sampler:
        metrics |= _sampler_mismatch(corrected, totals.tokens)
    return metrics | {"agrpo/skipped_steps": engine.skipped_steps}


def _sampler_mismatch(corrected: Counter[str], tokens: int) -> dict[str, float]:
    """How far the sampler was from the policy, over the tokens of all ranks."""
    sums = distributed.sum_over_ranks({name: corrected[name] for name in ("m", "squares", "held")})
    return {
        "agrpo/effective_sample_size": sums["m"] ** 2 / max(tokens * sums["squares"], 1e-12),
        "agrpo/sampler_dropped": sums["held"] / max(1, tokens),
    }


@dataclass(frozen=True)
class _Totals:
    """Denominators of the whole optimiser step, over all ranks."""

    tokens: int
    pair_weight: float
    pairs: int
    label_entropy: float  # bits, mean over the sampled pairs; 0 unless labels are soft
    has_critic: bool


def _micro_batches(
    engine: HybridEngine, experience: Experience, coefficients: Coefficients, config: PolicyConfig
) -> tuple[list[MicroBatch], _Totals]:
    """The experience cut to size, every denominator in place."""
    rollout, group_loss, device = experience.rollout, config.objective.group_loss, engine.device
    sequences = Sequences.of_rollout(rollout)
    parts = micro_batches(sequences.costs, config.training.micro_batch_tokens)
    layouts = [sequences.layout(part) for part in parts]
    members = [sequences.members(part) for part in parts]
    places = [sequences.token_places(m) for m in members]
    pairs = [ordered_pairs(experience.rewards[m], rollout.group[m] - rollout.group[m].min()) for m in members]
    confidences = [
        _confidence(p, experience.scores[m], experience.rewards[m], coefficients.reward_scale, group_loss)
        for p, m in zip(pairs, members, strict=True)
    ]
    flipped = [flips(c, group_loss) for c in confidences]
    if group_loss.labels == "soft":
        confidences = [torch.ones_like(c) for c in confidences]
    strata = strata_of_all_ranks(pairs, confidences, group_loss)
    scheme = group_loss.pair_weighting
    weights = [pair_weights(p, c, scheme, totals=strata) for p, c in zip(pairs, confidences, strict=True)]
    soft = group_loss.labels == "soft"
    sums = distributed.sum_over_ranks(
        {
            "tokens": len(rollout.tokens),
            "sequences": len(rollout.lengths),
            "weight": sum(float(w.sum()) for w in weights),
            "pairs": sum(len(w) for w in weights),
            "label_entropy": sum(float(label_entropy(f)) for f in flipped) if soft else 0.0,
        }
    )
    batches = [
        MicroBatch(
            layout=layout,
            advantages=experience.advantages[place].to(device),
            weights=token_weights(
                layout.lengths,
                config.objective.aggregation,
                total_tokens=int(sums["tokens"]),
                total_sequences=int(sums["sequences"]),
                max_length=config.sampling.max_completion_length,
            ).to(device),
            sampler=rollout.logp[place].to(device),
            reference=experience.reference[place].to(device) if len(experience.reference) else None,
            values=_part(experience.values, place, device),
            returns=_part(experience.returns, place, device),
            pairs=to_device(pairs[b], device),
            pair_weights=weights[b].to(device) / max(sums["weight"], 1e-12),
            flipped=flipped[b].to(device),
        )
        for b, (layout, place) in enumerate(zip(layouts, places, strict=True))
    ]
    if engine.has_reference and not len(experience.reference):
        batches = _with_reference(engine, batches, config.sampling.temperature)
    return batches, _Totals(
        tokens=int(sums["tokens"]),
        pair_weight=sums["weight"],
        pairs=int(sums["pairs"]),
        label_entropy=sums["label_entropy"] / max(1, sums["pairs"]),
        has_critic=len(experience.values) > 0,
    )


def _part(values: Tensor, places: Tensor, device: torch.device) -> Tensor:
    return (values[places] if len(values) else values).to(device)


def _with_reference(engine: HybridEngine, batches: Sequence[MicroBatch], temperature: float) -> list[MicroBatch]:
    found: list[MicroBatch] = []
    for b, counts, _ in in_step(batches):
        reference = engine.reference_logprobs(batches[b].layout, temperature)
        if counts:
            found.append(MicroBatch(**{**vars(batches[b]), "reference": reference}))
    return found


def _confidence(pairs: Pairs, scores: Tensor, rewards: Tensor, scale: float, config: GroupLossConfig) -> Tensor:
    """(m,) how sure the rewards are of each pair of a micro-batch's completions."""
    if config.confidence == "rewards":
        return confidence_from_rewards(rewards[pairs.better], rewards[pairs.worse], scale)
    votes = (~scores.isnan()).sum(1)  # (n,) rewards that scored the completion
    mean = scores.nanmean(1)
    deviation = ((scores - mean[:, None]).square().nansum(1) / votes.clamp(min=1)).sqrt()
    i, j = pairs.better, pairs.worse
    return confidence_from_ensemble(mean[i], mean[j], deviation[i], deviation[j])


def _group_loss(
    logp: Tensor, reference: Tensor, lengths: Tensor, batch: MicroBatch, config: GroupLossConfig
) -> tuple[Tensor, dict[str, float]]:
    """This micro-batch's share of L_group, and what the λ controller will observe."""
    scores = implicit_reward(logp, reference, lengths, alpha=config.alpha, reduction=config.implicit_reward)
    loss = group_preference_loss(scores, batch.pairs, batch.pair_weights, flipped=batch.flipped)
    uncertainty, _ = preference_uncertainty(scores, batch.pairs)
    return loss, {"group_loss": float(loss.detach()), "uncertainty": float(uncertainty)}


def _learn_ranked(engine: HybridEngine, ranked: RankedBatch, weight: float) -> Counter[str]:
    """The ranked data's part of L_group, backward included, up to the end of the optimiser step."""
    sums: Counter[str] = Counter()
    for i, counts, last in in_step(ranked.parts):
        logp, entropy, *critic = engine.forward(ranked.layouts[i])
        scores = implicit_scores(engine, ranked.layouts[i], logp, ranked.config)
        own = ranked.loss(i, scores)
        loss = weight * own
        unused = 0.0 * sum(part.sum() for part in (entropy, *critic))
        engine.backward(loss * counts + unused, last)
        if counts:
            observed = ranked.observe(i, scores)
            sums.update(ranked_loss=float(own.detach()), loss=float(loss.detach()))
            sums.update({f"ranked_{name}": value for name, value in observed.items()})
    return sums


_SUMS = ("loss", "group_loss", "uncertainty", "value_loss", "ranked_loss", "ranked_uncertainty", "ranked_right")


def _numbers(terms: PolicyTerms) -> dict[str, float]:
    return {field.name: float(getattr(terms, field.name)) for field in fields(terms)}


def _complete(sums: Counter[str]) -> dict[str, float]:
    """Every key on every rank, in one order."""
    return {name: float(sums[name]) for name in (*_SUMS, *(field.name for field in fields(PolicyTerms)))}


def _means(
    sums: dict[str, float], norm: float, update: int, totals: _Totals, ranked: RankedBatch | None
) -> dict[str, float]:
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
    if totals.has_critic:
        metrics["agrpo/value_loss"] = sums["value_loss"] / tokens
    if totals.pair_weight > 0 and totals.pairs > 0 and sums["uncertainty"] > 0:
        metrics["agrpo/group_loss"] = sums["group_loss"]
        metrics["agrpo/uncertainty"] = sums["uncertainty"] / totals.pairs
        if totals.label_entropy:
            metrics["agrpo/label_entropy"] = totals.label_entropy
    if ranked is not None and ranked.totals["pairs"]:
        metrics["agrpo/ranked_loss"] = sums["ranked_loss"]
        metrics["agrpo/ranked_accuracy"] = sums["ranked_right"] / ranked.totals["pairs"]
        metrics["agrpo/ranked_uncertainty"] = sums["ranked_uncertainty"] / ranked.totals["pairs"]
    if update == 0:
        metrics |= {"loss": sums["loss"], "grad_norm": norm}
    return metrics

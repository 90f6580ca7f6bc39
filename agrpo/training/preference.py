"""Learning from ranked groups: the confidence-weighted group loss, and stage 2's optimiser step around it."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from agrpo.algorithms.preference import (
    Pairs,
    confidence_from_ensemble,
    confidence_from_margin,
    flip_probability,
    group_preference_loss,
    implicit_reward,
    label_entropy,
    ordered_pairs,
    pair_weights,
    preference_uncertainty,
    stratum_totals,
)
from agrpo.config import PairLossConfig, PreferenceLossConfig, RewardConfig
from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.engine.layout import Layout
from agrpo.training.batches import Sequences, in_step, micro_batches
from agrpo.types import PreferenceGroup


def margin_scale(groups: Sequence[PreferenceGroup]) -> float:
    """The unit of the annotators' margins: their mean size over the data, or 1 where there are none."""
    margins = [abs(g.margin) for g in groups if g.margin is not None]
    return sum(margins) / len(margins) if any(margins) else 1.0


def confidence_of(pairs: Pairs, groups: Sequence[PreferenceGroup], margin_scale: float) -> Tensor:
    """(M,) confidence in [0, 1] of each pair.

    From its margin, else from an ensemble's judgement of its two completions, else the smaller of their own
    confidences, else 1.
    """
    own, margin, mean, deviation = (torch.tensor(column) for column in _columns(groups))  # (N,) each
    i, j = pairs.better, pairs.worse
    smaller = torch.minimum(own[i], own[j])
    judged = confidence_from_ensemble(mean[i], mean[j], deviation[i], deviation[j])
    from_margin = confidence_from_margin(margin[i], margin_scale)
    return torch.where(margin[i].isnan(), torch.where(mean[i].isnan(), smaller, judged), from_margin)


def _columns(groups: Sequence[PreferenceGroup]) -> tuple[list[float], ...]:
    """Confidence, margin, mean and deviation of every completion; NaN where the data has none."""
    columns: tuple[list[float], ...] = ([], [], [], [])
    for group in groups:
        count = len(group.completions)
        margin = math.nan if group.margin is None else group.margin
        for column, values in zip(
            columns,
            (
                group.confidences or [1.0] * count,
                [margin] * count,
                group.means or [math.nan] * count,
                group.deviations or [math.nan] * count,
            ),
            strict=True,
        ):
            column += values
    return columns


class RankedBatch:
    """This rank's preference groups of one optimiser step: micro-batches, pairs, weights, and the global denominators.

    Args:
        batch: the groups' tokens, as many groups as `groups`.
        config: how pairs are weighed and what their confidence does.
        margin_scale: the unit of the data's margins.
        micro_batch_tokens: of one forward.
        heads: how many judge; each of several leaves out the groups of another fifth of the prompts.
    """

    def __init__(
        self,
        batch: Sequences,
        groups: Sequence[PreferenceGroup],
        config: PairLossConfig,
        margin_scale: float,
        micro_batch_tokens: int,
        heads: int = 1,
    ) -> None:
        self.config = config
        self.parts = micro_batches(batch.costs, micro_batch_tokens)
        self.layouts = [batch.layout(part) for part in self.parts]
        self.tokens = len(batch.tokens)
        self.pairs: list[Pairs] = []
        self.flipped: list[Tensor] = []
        self.best: list[Tensor] = []  # each micro-batch's completions of the highest level of their group
        confidences = []
        levels = torch.tensor([level for g in groups for level in g.levels])
        for part in self.parts:
            members = batch.members(part)
            local = torch.searchsorted(torch.tensor(part), batch.group[members])
            self.pairs.append(ordered_pairs(levels[members], local))
            confidence = confidence_of(self.pairs[-1], [groups[g] for g in part], margin_scale)
            confidences.append(confidence if config.labels == "weighted" else torch.ones_like(confidence))
            self.flipped.append(flips(confidence, config))
            top = torch.zeros(len(part), dtype=levels.dtype)
            top.scatter_reduce_(0, local, levels[members], "amax", include_self=False)
            self.best.append((levels[members] == top[local]).nonzero()[:, 0])
        strata = strata_of_all_ranks(self.pairs, confidences, config)
        teaches = torch.tensor([[_teaches(g, head, heads) for head in range(heads)] for g in groups])  # (P, heads)
        self.weights = []  # (m, heads) of each micro-batch's pairs
        for part, pairs, confidence in zip(self.parts, self.pairs, confidences, strict=True):
            weight = pair_weights(pairs, confidence, config.pair_weighting, totals=strata)  # (m,)
            of_pair = batch.group[batch.members(part)][pairs.better]  # (m,)
            self.weights.append(weight[:, None] * teaches[of_pair])
        of_best = [int(layout.lengths[b].sum()) for layout, b in zip(self.layouts, self.best, strict=True)]
        self.totals = distributed.sum_over_ranks(
            {
                **{f"weight/{head}": sum(float(w[:, head].sum()) for w in self.weights) for head in range(heads)},
                "pairs": sum(len(p.gap) for p in self.pairs),
                "best_tokens": sum(of_best),
                "label_entropy": sum(float(label_entropy(f)) for f in self.flipped if config.labels == "soft"),
            }
        )

    def loss(self, i: int, scores: Tensor, margin: float = 0.0, centring: float = 0.0) -> Tensor:
        """Micro-batch i's share of L_group, the mean over the heads, from the (n, heads) scores of its completions."""
        pairs, weights = to_device(self.pairs[i], scores.device), self.weights[i].to(scores.device)
        shape = self.config.loss if isinstance(self.config, PreferenceLossConfig) else "logistic"
        how = {"shape": shape, "flipped": self.flipped[i].to(scores.device), "alpha": self.config.alpha}
        loss = scores.new_zeros(())
        for head, (own, weight) in enumerate(zip(scores.unbind(1), weights.unbind(1), strict=True)):
            total = group_preference_loss(own, pairs, weight, margin=margin, **how)
            if centring:
                total = total + centring * (weight * (own[pairs.better] + own[pairs.worse]).square()).sum()
            loss = loss + total / max(self.totals[f"weight/{head}"], 1e-12)
        return loss / scores.shape[1]

    def observe(self, i: int, scores: Tensor) -> dict[str, float]:
        """Sums over micro-batch i's pairs: how little the heads' mean tells them apart, how many it orders rightly."""
        pairs, scores = to_device(self.pairs[i], scores.device), scores.mean(1)
        uncertainty, _ = preference_uncertainty(scores, pairs)
        right = (scores[pairs.better] > scores[pairs.worse]).sum()
        return {"uncertainty": float(uncertainty), "right": float(right)}


def _teaches(group: PreferenceGroup, head: int, heads: int) -> bool:
    """Does the head learn from the group? A hash of the prompt decides, so that a head misses the same ones always."""
    return heads == 1 or zlib.crc32(repr(group.prompt).encode()) % 5 != head % 5


def flips(confidence: Tensor, config: PairLossConfig) -> Tensor:
    """(M,) probability that each pair's label is the wrong way round, as the loss is to believe it."""
    if config.labels == "soft":
        return flip_probability(confidence)
    smoothing = config.label_smoothing if isinstance(config, PreferenceLossConfig) else 0.0
    return torch.full_like(confidence, smoothing)


def strata_of_all_ranks(
    pairs: Sequence[Pairs], confidences: Sequence[Tensor], config: PairLossConfig
) -> dict[float, float]:
    """Σ confidence by level gap over all micro-batches of all ranks; empty unless the pairs are stratified."""
    strata: Counter[float] = Counter()
    if config.pair_weighting == "hierarchical":
        own = [stratum_totals(p, c) for p, c in zip(pairs, confidences, strict=True)]
        for part in distributed.gather_objects(own):
            for totals in part:
                strata.update(totals)
    return dict(strata)


def to_device(pairs: Pairs, device: torch.device) -> Pairs:
    return Pairs(*(value.to(device) for value in (pairs.better, pairs.worse, pairs.gap)))


def implicit_scores(engine: HybridEngine, layout: Layout, logp: Tensor, config: PairLossConfig) -> Tensor:
    """(n, 1) rewards that the policy implies for a layout's completions."""
    reference = engine.reference_logprobs(layout)
    lengths = layout.lengths.to(logp.device)
    return implicit_reward(logp, reference, lengths, alpha=config.alpha, reduction=config.implicit_reward)[:, None]


def fit_preferences(
    engine: HybridEngine,
    batch: Sequences,
    groups: Sequence[PreferenceGroup],
    config: RewardConfig,
    lambda_: float,
    margin_scale: float,
    learning_rate: float,
) -> dict[str, float]:
    """One optimiser step on this rank's preference groups: L = λ·L_group + (1 − λ)·L_reg.

    L_group is over the pairs of all ranks, of the score head's scores or, with `kind: implicit`, of the rewards that
    the policy implies. L_reg is the negative log-likelihood of each group's best completions through the backbone's own
    head, a mean over their tokens.
    """
    budget = config.training.micro_batch_tokens
    ranked = RankedBatch(batch, groups, config.objective, margin_scale, budget, config.heads)
    sums: Counter[str] = Counter(tokens=ranked.tokens)
    for i, counts, last in in_step(ranked.parts):
        layout, best = ranked.layouts[i], ranked.best[i].to(engine.device)
        if config.kind == "head":
            scores, spoken = engine.forward(layout, best if lambda_ < 1 else None)  # (n, heads), (c',)
        else:
            logp, _ = engine.forward(layout)
            scores = implicit_scores(engine, layout, logp, config.objective)
            spoken = logp[batch_tokens(layout, ranked.best[i]).to(engine.device)]
        loss_group = ranked.loss(i, scores, config.margin, config.centring)
        loss_reg = -spoken.sum() / max(ranked.totals["best_tokens"], 1)
        loss = (lambda_ * loss_group + (1 - lambda_) * loss_reg) * counts
        engine.backward(loss, last)
        if counts:
            sums.update(loss=float(loss.detach()), group=float(loss_group.detach()), reg=float(loss_reg.detach()))
            sums.update(ranked.observe(i, scores))
    norm = engine.step(learning_rate)
    names = ("loss", "group", "reg", "uncertainty", "right", "tokens")
    total = distributed.sum_over_ranks({name: float(sums[name]) for name in names})
    pairs = max(ranked.totals["pairs"], 1)
    metrics = {
        "loss": total["loss"],
        "accuracy": total["right"] / pairs,
        "grad_norm": norm,
        "agrpo/skipped_steps": engine.skipped_steps,
        "agrpo/group_loss": total["group"],
        "agrpo/regulariser": total["reg"],
        "agrpo/uncertainty": total["uncertainty"] / pairs,
        "num_tokens": total["tokens"],
    }
    if config.objective.labels == "soft":
        metrics["agrpo/label_entropy"] = ranked.totals["label_entropy"] / pairs
    return metrics


def batch_tokens(layout: Layout, members: Tensor) -> Tensor:
    """Places on a layout's (C,) completion axis of some of its completions' tokens."""
    chosen = torch.zeros(len(layout.lengths), dtype=torch.bool).index_fill_(0, members, True)
    return chosen.repeat_interleave(layout.lengths).nonzero()[:, 0]


def score_groups(engine: HybridEngine, batch: Sequences, config: RewardConfig) -> Tensor:
    """(N,) scores of all completions, the mean over the heads; every rank scores all of them."""
    found = []
    for part in micro_batches(batch.costs, config.training.micro_batch_tokens):
        layout = batch.layout(part)
        scores, *_ = engine.evaluate(layout)
        if config.kind == "implicit":
            scores = implicit_scores(engine, layout, scores, config.objective)
        found.append(scores.mean(1).cpu())
    return torch.cat(found)

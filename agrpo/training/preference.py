"""The reward model's optimiser step: the confidence-weighted group loss and the text-generation regulariser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from agrpo.algorithms.preference import (
    Pairs,
    confidence_from_margin,
    group_preference_loss,
    ordered_pairs,
    pair_weights,
    preference_uncertainty,
    stratum_totals,
)
from agrpo.config import RewardConfig
from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.training.batches import Sequences, in_step, micro_batches
from agrpo.types import PreferenceGroup


def margin_scale(groups: Sequence[PreferenceGroup]) -> float:
    """The unit of the annotators' margins: their mean size over the data, or 1 where there are none."""
    margins = [abs(g.margin) for g in groups if g.margin is not None]
    return sum(margins) / len(margins) if any(margins) else 1.0


def confidence_of(pairs: Pairs, groups: Sequence[PreferenceGroup], margin_scale: float) -> Tensor:
    """(M,) confidence in [0, 1] of each pair: from its margin, else the smaller of its two completions', else 1."""
    own: list[float] = []
    margin: list[float] = []
    for group in groups:
        own += group.confidences or [1.0] * len(group.completions)
        margin += [torch.nan if group.margin is None else group.margin] * len(group.completions)
    confidence = torch.tensor(own)
    margins = torch.tensor(margin)[pairs.better]
    smaller = torch.minimum(confidence[pairs.better], confidence[pairs.worse])
    return torch.where(margins.isnan(), smaller, confidence_from_margin(margins, margin_scale))


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

    L_group is Σ w·−log σ(s_i − s_j − margin) / Σ w over the pairs of all ranks; L_reg is the negative log-likelihood of
    each group's best completions through the backbone's own head, a mean over their tokens.
    """
    scheme = config.objective.pair_weighting
    levels = torch.tensor([level for g in groups for level in g.levels])
    parts = micro_batches(batch.costs, config.training.micro_batch_tokens)
    pairs, confidences, spoken = [], [], []
    for part in parts:
        members = batch.members(part)
        local = batch.group[members] - part[0]
        pairs.append(ordered_pairs(levels[members], local))
        confidences.append(confidence_of(pairs[-1], [groups[g] for g in part], margin_scale))
        best = torch.zeros(len(part), dtype=levels.dtype).scatter_reduce(
            0, local, levels[members], "amax", include_self=False
        )
        spoken.append((levels[members] == best[local]).nonzero()[:, 0])
    strata: Counter[float] = Counter()
    if scheme == "hierarchical":
        for totals in distributed.gather_objects(
            [stratum_totals(p, c) for p, c in zip(pairs, confidences, strict=True)]
        ):
            for part_totals in totals:
                strata.update(part_totals)
    weights = [pair_weights(p, c, scheme, totals=strata) for p, c in zip(pairs, confidences, strict=True)]
    tokens = sum(int(batch.lengths[batch.members(part)][s].sum()) for part, s in zip(parts, spoken, strict=True))
    totals = distributed.sum_over_ranks(
        {"weight": sum(float(w.sum()) for w in weights), "tokens": tokens, "pairs": sum(len(p.gap) for p in pairs)}
    )
    sums: Counter[str] = Counter(tokens=len(batch.tokens))
    for i, counts, last in in_step(parts):
        layout = batch.layout(parts[i])
        scores, logp = engine.forward(layout, spoken[i].to(engine.device) if lambda_ < 1 else None)
        here = Pairs(*(value.to(scores.device) for value in (pairs[i].better, pairs[i].worse, pairs[i].gap)))
        weight = weights[i].to(scores.device)
        loss_group = group_preference_loss(scores, here, weight, margin=config.margin) / max(totals["weight"], 1e-12)
        if config.centring:
            both = scores[here.better] + scores[here.worse]
            loss_group = loss_group + config.centring * (weight * both.square()).sum() / max(totals["weight"], 1e-12)
        loss_reg = -logp.sum() / max(totals["tokens"], 1)
        loss = (lambda_ * loss_group + (1 - lambda_) * loss_reg) * counts
        engine.backward(loss, last)
        if counts:
            uncertainty, _ = preference_uncertainty(scores, here)
            right = (scores[here.better] > scores[here.worse]).sum()
            sums.update(loss=float(loss.detach()), group=float(loss_group.detach()), reg=float(loss_reg.detach()))
            sums.update(uncertainty=float(uncertainty), right=float(right))
    norm = engine.step(learning_rate)
    names = ("loss", "group", "reg", "uncertainty", "right", "tokens")
    total = distributed.sum_over_ranks({name: float(sums[name]) for name in names})
    return {
        "loss": total["loss"],
        "accuracy": total["right"] / max(totals["pairs"], 1),
        "grad_norm": norm,
        "agrpo/group_loss": total["group"],
        "agrpo/regulariser": total["reg"],
        "agrpo/uncertainty": total["uncertainty"] / max(totals["pairs"], 1),
        "num_tokens": total["tokens"],
    }


def score_groups(engine: HybridEngine, batch: Sequences, budget: int) -> Tensor:
    """(N,) scores of all completions; every rank scores all of them."""
    parts = micro_batches(batch.costs, budget)
    return torch.cat([engine.evaluate(batch.layout(part))[0].cpu() for part in parts])
